"""Many ranks compute what one does: sequences spread over ranks, weights sharded and replicated, 14B on 8 devices."""

from __future__ import annotations

import pytest
import torch
from _scale_out_worker import CASES, loss_of, model_of, spread
from _server import free_port, join, launch

from idc.errors import UserError
from idc.models.sequence_parallel import check_heads


@pytest.fixture(scope="module")
def spread_results(tmp_path_factory):
    out, port = tmp_path_factory.mktemp("spread"), free_port()
    assert join(launch(spread, [(rank, 4, port, str(out)) for rank in range(4)])) == [0] * 4
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_sequence_spread_over_ranks_has_the_outputs_and_gradients_of_one_rank(spread_results, name, ranks):
    model = model_of(CASES[name][0])
    groups = 4 // ranks
    outputs = []
    for data_rank in range(groups):
        output, loss = loss_of(model, name, data_rank)
        (loss / groups).backward()
        outputs.append(output.detach())
    for rank, results in enumerate(spread_results):
        output, gradients = results[ranks, name]
        torch.testing.assert_close(output, outputs[rank // ranks], rtol=1e-5, atol=1e-5)
        for parameter_name, parameter in model.named_parameters():
            torch.testing.assert_close(
                gradients[parameter_name], parameter.grad, rtol=1e-4, atol=1e-6, msg=f"{rank} {parameter_name}"
            )


@pytest.mark.parametrize(
    ("heads", "ranks", "says"), [(40, 3, "is 2 (of 2, 4, 5, 8, 10, 20, 40)"), (12, 8, "is 6 (of 2, 3, 4, 6, 12)")]
)
def test_heads_that_do_not_divide_over_the_ranks_are_refused(heads, ranks, says):
    with pytest.raises(UserError, match=f"tensor_parallel_size={ranks}: .*{heads} attention heads") as error:
        check_heads(heads, ranks)
    assert says in str(error.value)
    check_heads(heads, 4)
