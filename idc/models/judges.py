"""Judges: models that look at pictures and answer in words, in this process or behind an OpenAI-compatible server.

Answers are those at temperature 0. Of a server that is a request and not a promise: what it batches together may
still tip a tie, so a seed goes with every request and a protocol may ask more than once.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idc.errors import UserError
from idc.models.batches import in_batches
from idc.models.frozen import load_model, load_weights, torch_dtype
from idc.models.pretrained import Picture, Pretrained, for_processor

# Of what a processor makes of a text: one number a token, `[1, L]`.
_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class JudgeError(RuntimeError):
    """No answer for this input: the judge refused, was cut short or could not be reached. Other inputs may do."""


class JudgeUnavailableError(JudgeError):
    """The judge could not be reached, for this input as for others: another time it may be."""


class Question(NamedTuple):
    """Pictures (RGB uint8 `[H, W, 3]`, in order; there may be none) followed by a prompt."""

    images: Sequence[Picture]
    prompt: str


class Judge(ABC):
    """What a metric, or a step of curation, asks of a judge."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name, as a report shows it."""

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> Any:
        """Get ready; idempotent."""

    @abstractmethod
    def unload(self) -> None:
        """Free what `load` took."""

    @abstractmethod
    def answers(self, images: Sequence[Picture], prompt: str, seeds: Sequence[int]) -> list[str]:
        """One answer per seed to the pictures (RGB uint8 `[H, W, 3]`, in order) followed by the prompt.

        Raises:
            JudgeError: if any of them cannot be had.
            UserError: if none can ever be had with these settings.
        """

    def answer_each(self, questions: Sequence[Question]) -> list[str | JudgeError]:
        """Of each question its answer with seed 0, or why there is none, in their order.

        They are asked one after another; a judge that gains from more at once overrides this.

        Raises:
            UserError: if none can ever be had with these settings.
        """
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> str | JudgeError:
        try:
            return self.answers(question.images, question.prompt, [0])[0]
        except JudgeError as error:
            return error.with_traceback(None)  # which would keep the pictures for as long as the error is kept


class ImageTextJudge(Pretrained, Judge):
    """Any image-text-to-text model of transformers (Qwen2.5-VL, LLaVA, InternVL, ...), greedy, in this process.

    Args:
        path: a folder saved with save_pretrained (model and processor, with a chat template), or a hub id.
        dtype: of weights and activations.
        max_tokens: longest answer, in tokens.
    """

    _heavy = ("_model", "_processor")
    _processor: Any = None
    weights = "an image-text-to-text model: config.json, model*.safetensors, the tokenizer and the image processor"

    def __init__(
        self, path: str = "Qwen/Qwen2.5-VL-7B-Instruct", dtype: str | torch.dtype = "bfloat16", max_tokens: int = 64
    ) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: must be at least 1; the default is 64")
        self.path, self.dtype, self.max_tokens = path, torch_dtype(dtype), max_tokens

    def _build(self) -> None:
        self._needs("the tokenizer", "tokenizer_config.json")
        from transformers import AutoModelForImageTextToText

        self._processor = load_weights(self.path, self.weights, lambda: image_text_processor(self.path))
        if _template(self._processor) is None:
            raise UserError(f"path={self.path!r}: has no chat template; give a model tuned to follow instructions")
        self._model = load_model(AutoModelForImageTextToText, self.path, self.weights, self.dtype)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"max_tokens": self.max_tokens}

    def answers(self, images: Sequence[Picture], prompt: str, seeds: Sequence[int]) -> list[str]:
        """As `Judge.answers`. Greedy decoding draws nothing: the one answer stands for all seeds."""
        return [self.generate(images, prompt)] * len(seeds) if seeds else []

    def generate(self, images: Sequence[Picture], prompt: str) -> str:
        """The greedy answer, without special tokens and outer white space.

        Raises:
            JudgeError: for an answer that `max_tokens` cut short.
        """
        (answer,) = self.answer_each([Question(images, prompt)])
        if isinstance(answer, JudgeError):
            raise answer
        return answer

    def answer_each(self, questions: Sequence[Question]) -> list[str | JudgeError]:
        """As `Judge.answer_each`, generated together: a step of decoding costs about the same for one as for several.

        Shorter questions are padded on the left. That rounds differently, and may tip a near tie: an answer may depend
        on what is asked with it, on its place and number, and on nothing that was asked before. Those without pictures
        go apart from those with some, and so do pictures whose tensors do not go together (of models that cut them
        into a varying number of tiles). The inputs of all questions lie on the device at once; where its memory does
        not suffice to answer them, they are answered by halves.

        Raises:
            torch.OutOfMemoryError: where it does not suffice for one.
        """
        if not questions:
            return []
        answers: dict[int, str | JudgeError] = {}
        with self.inference():
            inputs = [self._inputs(images, self.chat(len(images), prompt)) for images, prompt in questions]
            for places in alike(inputs):
                together = in_batches([inputs[place] for place in places], len(places), self._generate)
                answers.update(zip(places, together, strict=True))
        return [answers[place] for place in range(len(questions))]

    def _generate(self, inputs: Sequence[dict[str, Tensor]]) -> list[str | JudgeError]:
        """The greedy answers to inputs that go together."""
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        # The sampling settings of a model's own generation config are void without sampling.
        free = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        free["pad_token_id"] = ends[0] if ends else None  # behind an answer that ended before others
        batch = padded(inputs)
        written = self._model.generate(**batch, **free, max_new_tokens=self.max_tokens)
        new = written[:, batch["input_ids"].shape[1] :].tolist()
        return [self._text(tokens, ends) for tokens in new]

    def _text(self, tokens: list[int], ends: Sequence[int]) -> str | JudgeError:
        """The words up to the first of the tokens `ends`."""
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[: end + 1]
        text: str = self._processor.tokenizer.decode(kept, skip_special_tokens=True).strip()
        if end is None and len(tokens) == self.max_tokens:
            return JudgeError(f"the answer was cut at max_tokens={self.max_tokens}: {quote(text)}")
        return text

    def level_logits(self, images: Sequence[Picture], question: str, answer: str, levels: Sequence[str]) -> list[float]:
        """Logits of `levels` as the next word of an answer that begins with `answer` (float32, in their order).

        The levels are told apart at the first token at which the tokenised answers differ. Where a level is several
        tokens its first one stands for it.

        Raises:
            UserError: if two levels have the same token there: the model's logits cannot tell them apart.
            JudgeError: for logits that are not finite.
        """
        with self.inference():
            prefix = self.chat(len(images), question) + answer
            texts = [f"{prefix} {level}" for level in levels]
            tokenised = [self._processor.tokenizer(text, **_special_tokens(self._processor, text)) for text in texts]
            cut, ids = deciding_tokens([list(tokens.input_ids) for tokens in tokenised], levels)
            # The processor writes out each picture's tokens, so what is left to cut is counted from the end.
            inputs = self._inputs(images, texts[0])
            end = inputs["input_ids"].shape[1] - (len(tokenised[0].input_ids) - cut)
            for key, tensor in inputs.items():
                if tensor.ndim == 2 and key in _OF_TOKENS:
                    inputs[key] = tensor[:, :end]
            keep = "logits_to_keep" in inspect.signature(self._model.forward).parameters
            logits = self._model(**inputs, use_cache=False, **({"logits_to_keep": 1} if keep else {})).logits
            chosen = logits[0, -1, ids].float()
        if not chosen.isfinite().all():
            raise JudgeError(f"the model's logits are not finite in {self.dtype}: {chosen.tolist()}")
        return chosen.tolist()

    def chat(self, images: int, prompt: str) -> str:
        """The model's own chat template around pictures and then the prompt, up to where the answer begins."""
        self.load(self.device)
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        template = _template(self._processor)
        return self._processor.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    def _inputs(self, images: Sequence[Picture], text: str) -> dict[str, Tensor]:
        pictures = {"images": for_processor(images)} if images else {}
        special = _special_tokens(self._processor, text)
        inputs = self._processor(text=[text], **pictures, return_tensors="pt", **special)
        moved = {key: tensor.to(self.device) for key, tensor in inputs.items()}
        return {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in moved.items()}


def alike(inputs: Sequence[dict[str, Tensor]]) -> list[list[int]]:
    """The places of inputs that go into one batch, in the order of their first ones: those with tensors of the same
    names and, but for tokens, of the same shape behind the first axis (which counts pictures, patches or rows)."""
    groups: dict[Any, list[int]] = {}
    for place, tensors in enumerate(inputs):
        kind = frozenset((key, () if key in _OF_TOKENS else tensor.shape[1:]) for key, tensor in tensors.items())
        groups.setdefault(kind, []).append(place)
    return list(groups.values())


def padded(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of one row each that are `alike`, as one batch of rows padded on the left to the longest.

    Padding is masked, and repeats the row's last token instead of the tokenizer's padding, which may be missing. It is
    no picture's, and a penalty on repetition (the published Qwen2.5-VL has one), which counts padding too in releases
    of transformers up to 5.17 at least, has met it already; Qwen's padding also ends answers, and would be penalised.
    """
    rows = [{"attention_mask": torch.ones_like(tensors["input_ids"]), **tensors} for tensors in inputs]
    longest = max(row["input_ids"].shape[1] for row in rows)

    def left(key: str, row: dict[str, Tensor]) -> Tensor:
        if key not in _OF_TOKENS:
            return row[key]
        value = int(row["input_ids"][0, -1]) if key == "input_ids" else 0
        return torch.nn.functional.pad(row[key], (longest - row[key].shape[1], 0), value=value)

    return {key: torch.cat([left(key, row) for row in rows]) for key in rows[0]}


def deciding_tokens(sequences: Sequence[Sequence[int]], levels: Sequence[str]) -> tuple[int, list[int]]:
    """Where the token sequences of `levels` (all with the same words before them) part, and each one's token there.

    Returns:
        The length of what they share, and the token after it for each level.

    Raises:
        UserError: if two levels have the same token there, or one ends there.
    """
    shared = 0
    while all(len(ids) > shared for ids in sequences) and len({ids[shared] for ids in sequences}) == 1:
        shared += 1
    seen: dict[int, str] = {}
    for level, ids in zip(levels, sequences, strict=True):
        if len(ids) <= shared:
            raise UserError(
                f"levels: {level!r} is the beginning of another level for this tokenizer; choose other words"
            )
        token = ids[shared]
        if token in seen:
            raise UserError(
                f"levels: {seen[token]!r} and {level!r} begin with the same token ({token}) of this tokenizer, "
                "so their logits cannot be told apart; choose other words or another model"
            )
        seen[token] = level
    return shared, list(seen)


def image_text_processor(path: str) -> Any:
    """The processor saved in `path`, for pictures (through PIL) and text only.

    The video part of a processor wants torchvision, which this kit does without, and the torchvision image
    processors resize a little differently: scores must not depend on whether it happens to be installed.
    """
    import transformers
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(path).model_type)
    return picture_processor(getattr(transformers, name or "", AutoProcessor), path)


def picture_processor(cls: Any, path: str, **where: Any) -> Any:
    """The processor of class `cls` saved in `path`, as `image_text_processor`; `where`: its subfolder, its revision."""
    # The top level's own is a stand-in that refuses to work without torchvision in some releases.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if "video_processor" in inspect.signature(cls.__init__).parameters:
        cls = _without_video(cls)
    processor = cls.from_pretrained(path, **where)
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **where)
    return processor


def _without_video(cls: Any) -> Any:
    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ) -> None:
        settings = {**kwargs, "video_processor": None, "chat_template": chat_template}
        cls.__init__(self, image_processor=image_processor, tokenizer=tokenizer, **settings)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": __name__})


def _template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None) or processor.tokenizer.chat_template


def _special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Chat templates that write the beginning-of-sequence token themselves must not get another."""
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": not (bos and text.startswith(bos))}


def quote(text: str, limit: int = 120) -> str:
    """`text` on one line in quotation marks, cut in its middle to about `limit` characters."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
    return f"'{line}'"
