"""Face backends: alignment and embeddings agree with insightface's own, and weights that lack something say so."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from _people import FACES, largest, photos, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from idc.errors import UserError
from idc.models.curricular import IR101, Block, load_ir101
from idc.models.face_packs import PACKS, CurricularFace, InsightFacePack
from idc.models.faces import (
    ARCFACE_LANDMARKS,
    DetectedFace,
    Face,
    FaceDetector,
    YuNetSFace,
    affinity,
    iou,
    norm_crop,
    sface_path,
    similarity_transform,
    unit,
)

DET_SIZE = 320


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return picture("skimage", "data", "astronaut.png")


@pytest.fixture(scope="module")
def arcface_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFace as insightface takes it: its picture the only input, and its scaling first in the graph, by which
    `ArcFaceONNX` knows that the network scales."""
    model = onnx.load(sface_path())
    nodes = sorted(model.graph.node, key=lambda node: not node.name.startswith(("_minus", "_mul")))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (data,) = (value for value in model.graph.input if value.name == "data")
    del model.graph.input[:]
    model.graph.input.append(data)
    path = tmp_path_factory.mktemp("onnx") / "recogniser.onnx"
    onnx.save(model, path)
    return path


def make_detector(path: Path, face: DetectedFace, scale: float) -> None:
    """A network with SCRFD's interface that sees `face`, given in pixels of a picture `scale` times smaller."""
    stride, side = 8, DET_SIZE // 8
    column, row = (round(value * scale / stride) for value in face.box.centre)
    box = face.box
    corners = np.array([box.left, box.top, box.left + box.width, box.top + box.height]) * scale
    anchor = np.array([column, row]) * stride
    distances = np.r_[anchor - corners[:2], corners[2:] - anchor] / stride
    outputs = []
    for kind, width, value in (
        ("score", 1, np.array([face.score])),
        ("box", 4, distances),
        ("landmarks", 10, ((face.landmarks * scale - anchor) / stride).ravel()),
    ):
        for step in (8, 16, 32):
            table = np.zeros((2 * (DET_SIZE // step) ** 2, width), np.float32)  # two anchors a place
            if step == stride:
                table[2 * (row * side + column)] = value
            outputs.append((f"{kind}_{step}", table))
    nodes = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(t)) for name, t in outputs]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(table.shape)) for name, table in outputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, arcface_onnx: Path, astronaut: np.ndarray) -> InsightFacePack:
    root = tmp_path_factory.mktemp("insightface")
    folder = root / "models" / "buffalo_l"
    folder.mkdir(parents=True)
    detector, recogniser = PACKS["buffalo_l"]
    make_detector(folder / detector, largest(astronaut), DET_SIZE / max(astronaut.shape))
    (folder / recogniser).write_bytes(arcface_onnx.read_bytes())
    return InsightFacePack(str(root), "buffalo_l", det_size=DET_SIZE)


@pytest.mark.parametrize("size", [112, 224])
def test_alignment_is_insightfaces_pixel_for_pixel(size):
    from insightface.utils import face_align

    for image in photos().values():
        face = largest(image)
        theirs = face_align.norm_crop(image, face.landmarks.astype(np.float32), size)
        assert np.abs(norm_crop(image, face.landmarks, size).astype(int) - theirs).max() <= 1


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.floats(0.1, 10), st.floats(-100, 100), st.floats(-100, 100))
def test_the_transform_undoes_any_turn_scale_and_shift(angle, scale, x, y):
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = ARCFACE_LANDMARKS @ turn.T + (x, y)
    transform = similarity_transform(moved, ARCFACE_LANDMARKS)
    np.testing.assert_allclose(moved @ transform[:, :2].T + transform[:, 2], ARCFACE_LANDMARKS, atol=1e-6)
    assert np.linalg.det(transform[:, :2]) > 0


def test_the_transform_never_mirrors_and_survives_points_that_coincide():
    mirrored = ARCFACE_LANDMARKS * (-1, 1)
    assert np.linalg.det(similarity_transform(mirrored, ARCFACE_LANDMARKS)[:, :2]) > 0
    assert np.isfinite(similarity_transform(np.ones((5, 2)), ARCFACE_LANDMARKS)).all()


def test_embeddings_are_those_of_insightfaces_own_interface_for_the_same_onnx(arcface_onnx):
    from insightface.app.common import Face as PackFace
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    theirs = ArcFaceONNX(str(arcface_onnx))
    assert (theirs.input_mean, theirs.input_std) == (0.0, 1.0)
    for image in photos().values():
        face = largest(image)
        bgr = np.ascontiguousarray(image[..., ::-1])
        expected = unit(theirs.get(bgr, PackFace(kps=face.landmarks.astype(np.float32))))
        ours = FACES.embed(image, face)
        assert ours.dtype == np.float32
        assert float(ours @ expected) == pytest.approx(1, abs=1e-4)


def test_a_pack_finds_and_embeds_through_insightface(pack, astronaut):
    expected = largest(astronaut)
    (found,) = pack.detect(astronaut)
    np.testing.assert_allclose(found.box, expected.box, atol=0.01)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=0.01)
    embedding = pack.embed(astronaut, found)
    assert float(np.linalg.norm(embedding)) == pytest.approx(1, abs=1e-5)
    assert float(embedding @ FACES.embed(astronaut, expected)) == pytest.approx(1, abs=1e-4)
    copied = pickle.loads(pickle.dumps(pack))
    pack.unload()
    np.testing.assert_array_equal(copied.embed(astronaut, found), pack.embed(astronaut, found))


def test_a_missing_pack_is_named_and_nothing_is_downloaded(tmp_path, pack):
    with pytest.raises(UserError, match=r"no folder .*models/buffalo_l; unpack buffalo_l.zip there"):
        InsightFacePack(str(tmp_path)).load()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="did you mean 'buffalo_l'"):
        InsightFacePack(pack.root, "bufalo_l").load()


def test_a_pack_that_lacks_files_or_has_broken_ones_says_which(tmp_path, arcface_onnx):
    folder = tmp_path / "models" / "antelopev2"
    (folder / "antelopev2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lacks scrfd_10g_bnkps\.onnx, glintr100\.onnx$"):
        InsightFacePack(str(tmp_path), "antelopev2").load()
    (folder / "antelopev2" / "glintr100.onnx").touch()
    with pytest.raises(UserError, match="one folder too deep"):
        InsightFacePack(str(tmp_path), "antelopev2").load()
    for name in PACKS["antelopev2"]:
        (folder / name).write_bytes(b"not a network")
    with pytest.raises(UserError, match="insightface cannot load this pack"):
        InsightFacePack(str(tmp_path), "antelopev2").load()
    own = tmp_path / "models" / "own"
    own.mkdir()
    (own / "recogniser.onnx").write_bytes(arcface_onnx.read_bytes())
    with pytest.raises(UserError, match="has no face detector"):
        InsightFacePack(str(tmp_path), "own").load()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InsightFacePack(det_size=300), "det_size=300: must be a multiple of 32 pixels; the nearest is 288"),
        (lambda: InsightFacePack(min_confidence=1.5), "min_confidence=1.5"),
        (lambda: YuNetSFace(threshold=0), "threshold=0"),
        (lambda: FaceDetector(1.0), "threshold=1.0"),
        (lambda: CurricularFace("w.bin", FACES, threshold=2), "threshold=2"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_backend_pickles_after_use(astronaut):
    backend = YuNetSFace(0.6)
    face = max(backend.detect(astronaut), key=lambda found: found.box.area)
    expected = backend.embed(astronaut, face)
    copied = pickle.loads(pickle.dumps(backend))
    assert copied.detector.threshold == 0.6
    np.testing.assert_array_equal(copied.embed(astronaut, face), expected)
    backend.unload()
    np.testing.assert_array_equal(backend.embed(astronaut, face), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (3000, 2), (64, 64)])
def test_pictures_without_a_face_of_any_size_have_none(shape):
    assert FACES.detect(np.full((*shape, 3), 128, np.uint8)) == []


def test_boxes_overlap_and_keep_their_size_when_moved():
    face = DetectedFace(Face(10, 20, 30, 40, 0.9), ARCFACE_LANDMARKS)
    moved = face.moved(5, -5)
    assert moved.box == Face(15, 15, 30, 40, 0.9)
    np.testing.assert_array_equal(moved.landmarks - face.landmarks, np.tile([5, -5], (5, 1)))
    assert iou(face.box, moved.box) == pytest.approx(25 * 35 / (2 * 1200 - 25 * 35))
    assert affinity(face.box, face.box) == 1
    assert affinity(face.box, Face(200, 20, 30, 40, 0.9)) == 0
    assert affinity(face.box, Face(10, 20, 60, 80, 0.9)) == 0
    assert affinity(face.box, Face(10, 20, 0, 0, 0.9)) == 0


def blank_state(inner_norm: bool = True, affine: bool = False) -> dict[str, torch.Tensor]:
    """A state dict of the right shapes that takes no room: every tensor is one number spread out."""
    with torch.device("meta"):
        wanted = IR101(inner_norm, affine).state_dict()
    return {
        key: torch.full((1,), 1.0 if key.endswith("running_var") else 0.0).expand(value.shape)
        for key, value in wanted.items()
        if not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(("inner_norm", "affine"), [(True, False), (False, True)], ids=["tface", "paper"])
def test_both_published_layouts_load(tmp_path, inner_norm, affine):
    state = blank_state(inner_norm, affine)
    # Names and shapes as the published files have them.
    last = 5 if inner_norm else 4
    assert state["input_layer.0.weight"].shape == (64, 3, 3, 3)
    assert state["body.3.shortcut_layer.0.weight"].shape == (128, 64, 1, 1)
    assert state[f"body.48.res_layer.{last}.running_mean"].shape == (512,)
    assert state["output_layer.3.weight"].shape == (512, 512 * 7 * 7)
    assert "body.49.res_layer.0.weight" not in state
    torch.save(state, tmp_path / "weights.bin")
    network = load_ir101(tmp_path / "weights.bin")
    assert not network.training
    assert sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) == 1 + 2 * 49 + 3


def test_weights_that_are_not_an_ir101_say_why(tmp_path):
    path, state = tmp_path / "weights.bin", blank_state()

    def refusal(content: object) -> str:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load_ir101(path)
        return str(caught.value)

    assert "output_layer.3.bias is missing" in refusal({k: v for k, v in state.items() if k != "output_layer.3.bias"})
    assert "head.weight has no place" in refusal({**state, "head.weight": torch.zeros(1)})
    assert "output_layer.3.bias is [256], the model's is [512]" in refusal(
        {**state, "output_layer.3.bias": torch.zeros(256)}
    )
    assert "no state dict of tensors" in refusal([1, 2])
    assert "cannot be read as weights" in refusal(b"half a file")
    assert "cannot be read as weights" in refusal({"epoch": Path("evil")})  # an object that unpickling would run
    with pytest.raises(UserError, match="no such file"):
        load_ir101(tmp_path / "missing.bin")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_ir101(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("inner_norm", [True, False])
@pytest.mark.parametrize(("inside", "outside", "stride"), [(6, 6, 1), (6, 6, 2), (6, 8, 2)])
def test_a_block_is_the_published_arithmetic(inner_norm, inside, outside, stride):
    torch.manual_seed(0)
    block = Block(inside, outside, stride, inner_norm).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = block.state_dict()
    x = torch.randn(2, inside, 8, 8)

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(
            y, *(weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        )

    shift = int(inner_norm)
    y = F.conv2d(norm(x, "res_layer.0"), weights["res_layer.1.weight"], padding=1)
    y = norm(y, "res_layer.2") if inner_norm else y
    y = F.prelu(y, weights[f"res_layer.{2 + shift}.weight"])
    y = F.conv2d(y, weights[f"res_layer.{3 + shift}.weight"], stride=stride, padding=1)
    y = norm(y, f"res_layer.{4 + shift}")
    short = x[..., ::stride, ::stride]
    if inside != outside:
        short = norm(F.conv2d(x, weights["shortcut_layer.0.weight"], stride=stride), "shortcut_layer.1")
    torch.testing.assert_close(block(x), y + short)


def test_curricularface_sees_the_benchmarks_crop_as_rgb_and_returns_units(tmp_path, astronaut):
    from insightface.utils import face_align

    torch.manual_seed(0)
    network = IR101().eval()
    from safetensors.torch import save_file

    save_file(network.half().state_dict(), tmp_path / "weights.safetensors")  # half the size, as some publish it
    backend = CurricularFace(str(tmp_path / "weights.safetensors"), FACES)
    (face,) = backend.detect(astronaut)
    embedding = backend.embed(astronaut, face)

    import cv2

    crop = cv2.resize(face_align.norm_crop(astronaut, face.landmarks.astype(np.float32), 224), (112, 112))
    pixels = (torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = F.normalize(network.float()(pixels))[0].numpy()
    assert embedding.shape == (512,)
    assert float(np.linalg.norm(embedding)) == pytest.approx(1, abs=1e-5)
    assert float(embedding @ expected) == pytest.approx(1, abs=1e-4)
    backend.unload()
    assert pickle.loads(pickle.dumps(backend)).models == ("curricularface-ir101", *FACES.models)
