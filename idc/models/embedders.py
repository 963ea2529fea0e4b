"""Pictures and texts -> unit vectors of one space: CLIP, SigLIP and their kin, and GME-Qwen2-VL."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from idc.errors import UserError
from idc.models.frozen import load_model, torch_dtype
from idc.models.pretrained import Picture, Pretrained, not_rgb, sliver


class ImageTextEmbedder(Pretrained):
    """A frozen model that puts pictures and texts into one space; the vectors are float32."""

    @property
    def models(self) -> tuple[str, ...]:
        return (self.name,)

    def unfit(self, picture: Picture) -> str:
        """Why there is no vector of a picture, as of a sliver; "" where there is one."""
        return not_rgb(picture) or sliver(picture)

    def embed_images(self, pictures: Sequence[Picture]) -> Tensor:
        """Unit vectors, float32 `[N, D]` on the CPU, of RGB uint8 pictures `[H, W, 3]` of any sizes.

        Raises:
            UserError: for a picture that is `unfit`, or weights that are missing.
        """
        for picture in pictures:
            if reason := self.unfit(picture):
                raise UserError(reason)
        return self._unit(self._embed_images, pictures)

    def embed_texts(self, texts: Sequence[str], instruction: str = "") -> Tensor:
        """Unit vectors, float32 `[N, D]` on the CPU; what exceeds the model's longest text is cut off.

        Args:
            instruction: what the text is for, in words, for models that were trained with one; CLIP and SigLIP were
                not and ignore it.
        """
        return self._unit(lambda texts: self._embed_texts(texts, instruction), texts)

    def _unit(self, embed: Any, inputs: Sequence[Any]) -> Tensor:
        if not len(inputs):
            return torch.zeros(0, self.dim)
        with self.inference():
            return F.normalize(embed(inputs).float(), dim=-1).cpu()

    @property
    @abstractmethod
    def dim(self) -> int:
        """D; loads the model if it is not loaded."""

    @abstractmethod
    def _embed_images(self, pictures: Sequence[Picture]) -> Tensor: ...

    @abstractmethod
    def _embed_texts(self, texts: Sequence[str], instruction: str) -> Tensor: ...


class CLIPEmbedder(ImageTextEmbedder):
    """CLIP, SigLIP, SigLIP 2 or another dual encoder of transformers, with its own resize and crop (through PIL).

    Args:
        path: a folder saved with save_pretrained (model, image processor, tokenizer), or a hub id.
        batch: pictures or texts that go through the model at once.
    """

    weights = "a CLIP or SigLIP model: config.json, model*.safetensors, the image processor and the tokenizer"

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14", batch: int = 32, dtype: str | torch.dtype = "float32"
    ) -> None:
        if batch < 1:
            raise UserError(f"batch={batch}: must be at least 1; the default is 32")
        self.path, self.batch, self.dtype = path, batch, torch_dtype(dtype)

    def _build(self) -> None:
        self._needs("the image processor's settings", "preprocessor_config.json")
        self._needs("the tokenizer", "tokenizer_config.json")
        from transformers import AutoModel, AutoTokenizer

        # The top level's own is a stand-in that refuses to work without torchvision in some releases.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        # The PIL backend is the one that published scores were made with, and needs no torchvision.
        images = self._saved(AutoImageProcessor, backend="pil")
        tokenizer = self._saved(AutoTokenizer)
        model = load_model(AutoModel, self.path, self.weights, self.dtype)
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise UserError(f"path={self.path!r}: {type(model).__name__} does not embed both pictures and texts")
        self._model, self._images, self._tokenizer = model, images, tokenizer

    @property
    def dim(self) -> int:
        with self.inference():
            config = self._model.config
        return getattr(config, "projection_dim", None) or config.text_config.hidden_size

    def _embed_images(self, pictures: Sequence[Picture]) -> Tensor:
        vectors = []
        for start in range(0, len(pictures), self.batch):
            inputs = self._pixels(pictures[start : start + self.batch])
            inputs = inputs.to(self.device, self.dtype)
            vectors.append(_pooled(self._model.get_image_features(**inputs)))
        return torch.cat(vectors)

    def _embed_texts(self, texts: Sequence[str], instruction: str) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        # SigLIP reads the last position and was trained on padded texts; CLIP reads its end mark.
        padding = "max_length" if self._model.config.model_type.startswith("siglip") else "longest"
        settings = {"padding": padding, "max_length": length, "truncation": True, "return_tensors": "pt"}
        vectors = []
        for start in range(0, len(texts), self.batch):
            inputs = self._tokenizer(list(texts[start : start + self.batch]), **settings).to(self.device)
            vectors.append(_pooled(self._model.get_text_features(**inputs)))
        return torch.cat(vectors)


def _pooled(features: Any) -> Tensor:
    """Transformers 5 answers with an output object whose pooled part is projected; earlier ones with the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


_IMAGE = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_SILENT_INSTRUCTION = "You are a helpful assistant."


class GMEEmbedder(ImageTextEmbedder):
    """GME-Qwen2-VL: the last token's hidden state after a chat-formatted picture or text.

    As its published code computes it, which transformers' own Qwen2-VL path would not: positions simply count tokens,
    also within a picture (no two-dimensional ones); pictures are resized to multiples of 28 pixels and then once more
    into the token limits; they get the neutral instruction. One input at a time goes through the model, so that no
    vector depends on its neighbours.

    Args:
        path: a folder saved with save_pretrained (model, tokenizer), or a hub id.
        min_tokens, max_tokens: of a picture; 28 x 28 pixels make one token.
        max_length: tokens of a text with its instruction; a longer one is cut off.
        dtype: of weights and activations.
    """

    weights = "GME-Qwen2-VL: config.json, model*.safetensors and the tokenizer"

    def __init__(
        self,
        path: str = "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct",
        min_tokens: int = 256,
        max_tokens: int = 1280,
        max_length: int = 1800,
        dtype: str | torch.dtype = "float16",
    ) -> None:
        if not 0 < min_tokens <= max_tokens:
            raise UserError(f"min_tokens={min_tokens}: must be positive and at most max_tokens={max_tokens}")
        if max_length < 1:
            raise UserError(f"max_length={max_length}: must be at least 1; the default is 1800")
        self.path, self.dtype = path, torch_dtype(dtype)
        self.min_tokens, self.max_tokens, self.max_length = min_tokens, max_tokens, max_length

    def _build(self) -> None:
        self._needs("the tokenizer", "tokenizer_config.json")
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._tokenizer = self._saved(AutoTokenizer)
        # The head that writes words is not used, and some copies of the weights leave it out.
        cls, unused = Qwen2VLForConditionalGeneration, ("lm_head",)
        self._model = load_model(cls, self.path, self.weights, self.dtype, unused).model
        vision = self._model.config.vision_config
        area = (vision.patch_size * vision.spatial_merge_size) ** 2
        self._images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": self.min_tokens * area, "longest_edge": self.max_tokens * area},
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    @property
    def dim(self) -> int:
        with self.inference():
            return self._model.config.text_config.hidden_size

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {
            "tokens": [self.min_tokens, self.max_tokens],
            "max_length": self.max_length,
            "prompt": gme_prompt("text", "instruction"),
        }

    def _embed_texts(self, texts: Sequence[str], instruction: str) -> Tensor:
        prompts = [gme_prompt(text, instruction or _SILENT_INSTRUCTION) for text in texts]
        return torch.cat([self._last_hidden(self._ids(prompt)[: self.max_length]) for prompt in prompts])

    def unfit(self, picture: Picture) -> str:
        """As of any embedder; a picture is also unfit where rounding to whole tokens makes a sliver of it."""
        if reason := super().unfit(picture):
            return reason
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = picture.shape[:2]
        try:
            with self.inference():
                smart_resize(*self._size(height, width))  # what is rounded is resized again
        except ValueError as error:
            return f"picture of {width} x {height} pixels: {error}"
        return ""

    def _embed_images(self, pictures: Sequence[Picture]) -> Tensor:
        return torch.cat([self._embed_image(picture) for picture in pictures])

    def _embed_image(self, picture_HWC: Picture) -> Tensor:
        inputs = self._images(images=[self._resized(picture_HWC)], return_tensors="pt")
        tokens = int(inputs["image_grid_thw"].prod()) // self._images.merge_size**2
        start, pad, end = _IMAGE
        prompt = gme_prompt(start + pad * tokens + end, _SILENT_INSTRUCTION)
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        grid = inputs["image_grid_thw"].to(self.device)
        return self._last_hidden(self._ids(prompt), pixel_values=pixels, image_grid_thw=grid)

    def _resized(self, picture_HWC: Picture) -> Picture:
        from PIL import Image

        height, width = self._size(*picture_HWC.shape[:2])
        return np.asarray(Image.fromarray(picture_HWC).resize((width, height), Image.Resampling.BICUBIC))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in whole tokens. Raises ValueError where one side is more than 200 times the other."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        factor = self._images.patch_size * self._images.merge_size
        return smart_resize(height, width, factor, min_pixels=4 * factor**2, max_pixels=16384 * factor**2)

    def _ids(self, prompt: str) -> list[int]:
        return self._tokenizer(prompt, add_special_tokens=False).input_ids

    def _last_hidden(self, ids: Sequence[int], **picture: Tensor) -> Tensor:
        input_ids = torch.tensor([list(ids)], device=self.device)
        positions = torch.arange(len(ids), device=self.device).expand(3, 1, -1)
        output = self._model(input_ids=input_ids, position_ids=positions, use_cache=False, **picture)
        return output.last_hidden_state[:, -1]


def gme_prompt(text: str, instruction: str) -> str:
    """GME's chat format; its vector is the state at the final `<|endoftext|>`."""
    return (
        f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )
