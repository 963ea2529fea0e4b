"""Captions of clips by a vision-language model, in this process or behind a server that speaks the OpenAI protocol.

OpenS2V-5M's captions are by Qwen2.5-VL, the default here; the prompt is our own. What a model answers is checked: a
refusal, a loop or half a language is no caption.
"""

from __future__ import annotations

from typing import Any

from idc.curate.asking import AskingStep
from idc.curate.candidate import Candidate, Outcome, Pixels
from idc.curate.describing import model_version
from idc.curate.prose import CaptionError, check_caption, check_language, cut_at_sentence, plain_text, words_of
from idc.curate.reading import clip_frames
from idc.errors import UserError, nearest
from idc.models.judges import ImageTextJudge, Judge, JudgeError, Question

_RULES = """\
Name every person, animal and thing that matters by how they look: a person by age group, hair, build and clothing, an \
animal by kind and coat, a thing by colour, material and shape. Give each one phrase and keep to it, so that a reader \
can tell them apart ("the woman in the green coat"), and never call two of them by the same phrase. Say where each is \
and how they stand to one another: who holds what, who faces whom, what touches what.{doing} Then the place, the time \
of day and the light, and last the {camera}.

Write only what can be seen. No names of persons, no guesses about feelings, reasons, relationships, or what comes \
before and after, no remarks on quality, no "appears", "seems" or "possibly". Signs and subtitles count only where \
they are part of the scene.

Write one paragraph of plain English prose, in the present tense, of {length}. No list, no heading, no markdown, no \
preface: the answer is the caption alone."""

VIDEO_PROMPT = (
    "The pictures are frames of one video clip, in order and evenly spaced over its length. Write the caption of the "
    "clip.\n\n"
    + _RULES.format(
        doing=" Say what each does, in the order in which it happens, and how it changes.",
        camera="shot: how close and from where it is taken, and whether and how the camera moves",
        length="three to seven sentences",
    )
)
PICTURE_PROMPT = "Write the caption of the picture.\n\n" + _RULES.format(
    doing=" Say what each is doing.",
    camera="framing: how close and from where the picture is taken",
    length="two to five sentences",
)

GIVEN = ("keep", "combine", "replace")
LONG = ("cut", "drop")
MOST_RAW = 50_000  # characters of an answer or side-car that are looked at at all


class Caption(AskingStep):
    """Writes the caption of the clip, or checks the one that came with it.

    A candidate without a usable caption is dropped: "no caption" (the model failed, the server did not answer, or the
    answer was empty), "caption refused", "caption repeats itself", "caption in another language", "caption too short"
    or "caption too long". Where a given caption may stand in for a failed one, it does. `meta["caption"]` tells who
    wrote it ("given", "judge" or "both"), by which model, and what became of the given one.
    """

    def __init__(
        self,
        judge: Judge | None = None,
        frames: int = 8,
        prompt: str = VIDEO_PROMPT,
        picture_prompt: str = PICTURE_PROMPT,
        min_words: int = 8,
        max_words: int = 250,
        max_characters: int = 2000,
        long: str = "cut",
        language: str = "en",
        given: str = "keep",
        side: int = 512,
        batch: int = 8,
    ) -> None:
        """
        Args:
            judge: writes; Qwen2.5-VL-7B in this process where None. In this process it answers for `batch` clips at
                once; of one behind a server, up to its `concurrency` requests are under way, within `batch`.
            frames: of the clip that it sees, evenly spaced.
            prompt, picture_prompt: what it is asked about a clip, and about a still picture.
            min_words: a shorter caption is none; given ones may be shorter.
            max_words, max_characters: longest caption; umT5 reads 512 tokens, about 350 words.
            long: "cut" a longer one behind the last whole sentence that fits, or "drop" it.
            language: "en", or "any".
            given: a caption that came with the clip is "keep" (checked, and the model is asked only where it fails),
                "combine" (it stands first and the model's behind it) or "replace" (used only where the model fails).
            side: longer side of the pictures that the judge sees, in pixels.
            batch: candidates of a call. It holds `frames` pictures of each in memory; with a judge in this process so
                does the device, with what the model keeps of all of them.

        Raises:
            UserError: for a number out of its range, an unknown choice, or a judge whose answers are shorter than
                `max_words`.
        """
        for name, value, least in (("frames", frames, 1), ("min_words", min_words, 0), ("batch", batch, 1)):
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        if not max(1, min_words) <= max_words:
            raise UserError(f"max_words={max_words}: must be at least min_words={min_words}, and at least 1")
        if max_characters < 1 or side < 1:
            raise UserError(f"max_characters={max_characters}, side={side}: must be at least 1")
        for name, choice, choices in (("given", given, GIVEN), ("long", long, LONG)):
            if choice not in choices:
                raise UserError(f"{name}={choice!r}: no such choice{nearest(choice, choices)}")
        check_language(language)
        self.judge: Judge = ImageTextJudge(max_tokens=512) if judge is None else judge
        if (tokens := getattr(self.judge, "max_tokens", max_words)) < max_words:
            raise UserError(f"max_tokens={tokens} of the judge: max_words={max_words} take at least as many tokens")
        self.frames, self.prompt, self.picture_prompt, self.side = frames, prompt, picture_prompt, side
        self.min_words, self.max_words, self.max_characters = min_words, max_words, max_characters
        self.long, self.language, self.given, self.batch = long, language, given, batch

    def question(self, candidate: Candidate) -> Question | Outcome:
        from idc.metrics.natural import long_side  # brings torchmetrics along

        own, _ = self._given(candidate)
        if own and self.given == "keep":
            return self._as_given(candidate, own)
        _, pictures = clip_frames(candidate, self.frames)
        still = len(candidate.clip) == 1 if candidate.clip is not None else len(candidate.ranks) == 1
        shown: list[Pixels] = [long_side(picture, self.side) for picture in (pictures[:1] if still else pictures)]
        return Question(shown, self.picture_prompt if still else self.prompt)

    def answered(self, candidate: Candidate, answer: str | JudgeError) -> Outcome:
        own, fault = self._given(candidate)
        try:
            if isinstance(answer, JudgeError):
                raise CaptionError("no caption", str(answer))
            text = self._checked(answer, self.min_words)
            if own and self.given == "combine":
                text = self._fitting(f"{own} {text}")
        except CaptionError as error:
            if not own:
                detail = f"{error.detail}; the given one: {fault}" if fault else error.detail
                return candidate.dropped(self.name, error.reason, detail)
            return self._as_given(candidate, own, failure=str(error))
        by = "both" if own and self.given == "combine" else "judge"
        told = self._told(by, candidate, text, model=model_version(self.judge), **({"fault": fault} if fault else {}))
        return candidate.changed(caption=text, meta={"caption": told})

    def _as_given(self, candidate: Candidate, own: str, **more: str) -> Candidate:
        """With the caption that it came with; where an earlier run names who wrote that, it stays."""
        told = {"caption": self._told("given", candidate, own, **more)}
        if self.name in candidate.models:
            return candidate.changed(caption=own, meta=told, models=dict(candidate.models))
        return candidate.changed(caption=own, meta=told)

    def _given(self, candidate: Candidate) -> tuple[str, str]:
        """The given caption where it is one, and what is wrong with it where it is not."""
        if not candidate.caption.strip():
            return "", ""
        try:
            return self._checked(candidate.caption, 1), ""
        except CaptionError as error:
            return "", str(error)

    def _checked(self, text: str, least_words: int) -> str:
        plain = plain_text(text[:MOST_RAW])
        check_caption(plain, least_words, self.language)
        return self._fitting(plain)

    def _fitting(self, text: str) -> str:
        """The text within the limits of length; raises `CaptionError` where there is none."""
        words = len(words_of(text))
        if words <= self.max_words and len(text) <= self.max_characters:
            return text
        cut = cut_at_sentence(text, self.max_words, self.max_characters) if self.long == "cut" else ""
        if len(words_of(cut)) < max(1, self.min_words):
            limits = f"at most {self.max_words} and {self.max_characters}"
            raise CaptionError("caption too long", f"{words} words, {len(text)} characters; {limits}")
        return cut

    def _told(self, by: str, candidate: Candidate, text: str, **more: Any) -> dict[str, Any]:
        """For the provenance: who wrote it, and the given caption where it is not the whole of it."""
        given = candidate.caption[: self.max_characters]
        return {"by": by, **more, **({"given": given} if given.strip() and given != text else {})}
