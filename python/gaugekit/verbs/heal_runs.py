"""What a healing draws the student to: the teacher's hidden states, or what it foretells where the bases differ."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gaugekit import models
from gaugekit.calibration.moments import evaluating
from gaugekit.nn.sliced import RotatedEmbedding, SlicedNorm
from gaugekit.text.pooling import embeddings

QUERY_KEY = (
    "*query*",
    "*key*",
    "*c_attn*",
    "*q_proj*",
    "*k_proj*",
)  # what a truncation of the scores rewrote


def is_sliced(model: nn.Module) -> bool:
    """Whether the residual stream of ``model`` is in bases of its own."""
    return any(isinstance(module, SlicedNorm) for module in model.modules())


class HiddenStates:
    """Towards the hidden states after every block, in one basis for both models."""

    learning_rate = 1e-3
    together = 32  # held-out sentences
    held_out = 256  # sentences at most: enough for the fourth digit of a mean cosine

    @staticmethod
    def layer_steps(steps: int) -> int:
        """How many steps come before ``steps``, layer by layer, unless it is said."""
        return steps // 4

    def __init__(self, student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | None):
        self.student, self.teacher = student, teacher
        original = models.Live(teacher)
        if (reason := original.family.divided) is not None:
            raise ValueError(f"teacher: expected a model that reads one text, but {reason}")
        self.blocks = {model: models.Live(model).family.blocks(model) for model in (student, teacher)}
        if len(self.blocks[student]) != len(original):
            raise ValueError(
                f"student: expected {len(original)} blocks as in the teacher, got {len(self.blocks[student])}"
            )
        names = {name: p for name, p in student.named_parameters() if p.is_floating_point()}
        if patterns is None:
            self.trained = {n: p for n, p in names.items() if _matches(n, QUERY_KEY)} or names
        else:
            self.trained = _matching(names, patterns)

    def goals(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """What the teacher makes of a held-out batch."""
        return self.states(self.teacher, batch)

    @staticmethod
    def told(before: dict, after: dict) -> dict[str, float]:
        """What a report says of the first and the last row of the curve."""
        return {"mean_cosine_before": before["mean_cosine"], "mean_cosine_after": after["mean_cosine"]}

    @torch.no_grad()
    def states(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        """The hidden states after every block, [B, T, D] each."""
        with evaluating(model):
            return self._states(model, batch)

    @staticmethod
    def _states(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        return list(model.base_model(**batch, output_hidden_states=True).hidden_states[1:])

    def end_loss(self, batch: dict[str, Tensor]) -> Tensor:
        with evaluating(self.student):
            states = self._states(self.student, batch)
        return self._distance(states, self.states(self.teacher, batch), batch["attention_mask"])

    @staticmethod
    def _distance(states: list[Tensor], goals: list[Tensor], mask: Tensor) -> Tensor:
        errors = [_error(y, goal, mask) for y, goal in zip(states, goals, strict=True)]
        return errors[-1] + sum(errors[:-1], errors[-1] * 0) / max(len(errors) - 1, 1)

    def learn(self, batch: dict[str, Tensor], by_layer: bool) -> None:
        """The gradients of one batch, clipped to a norm of 1, in the parameters that are trained."""
        loss = self.layers_loss(batch) if by_layer else self.end_loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)

    def layers_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """One run of the student in which every block is given what the teacher's block was given."""
        inputs, goals = self._watch(self.teacher, batch)
        with evaluating(self.student):
            _, outputs = self._watch(self.student, batch, inputs)
        errors = [_error(y, goal, batch["attention_mask"]) for y, goal in zip(outputs, goals, strict=True)]
        return sum(errors[1:], errors[0]) / len(errors)

    def _watch(
        self, model: nn.Module, batch: dict[str, Tensor], instead: list[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What enters and what leaves each block; ``instead`` replaces what enters (a block's mask stays its own)."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def before(module, arguments, named):
            given = arguments[0] if arguments else named["hidden_states"]
            inputs.append(given if instead is None else instead[len(inputs)])
            if instead is None:
                return None
            if arguments:
                return (inputs[-1], *arguments[1:]), named
            return arguments, {**named, "hidden_states": inputs[-1]}

        def after(module, arguments, out):
            outputs.append(out[0] if isinstance(out, tuple) else out)

        hooks = []
        for block in self.blocks[model]:
            hooks += [
                block.register_forward_pre_hook(before, with_kwargs=True),
                block.register_forward_hook(after),
            ]
        try:
            if instead is None:
                self.states(model, batch)
            else:
                self._states(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return inputs, outputs

    @torch.no_grad()
    def measure(self, held: list[tuple[dict[str, Tensor], list[Tensor]]]) -> dict[str, float]:
        loss, cosines = 0.0, []
        for batch, goals in held:
            states, mask = self.states(self.student, batch), batch["attention_mask"]
            loss += float(self._distance(states, goals, mask)) / len(held)
            pooled = (embeddings(last, mask) for last in (goals[-1], states[-1]))
            cosines.append(nn.functional.cosine_similarity(*pooled, dim=-1))
        all_cosines = torch.cat(cosines)
        return {
            "loss": loss,
            "mean_cosine": float(all_cosines.mean()),
            "min_cosine": float(all_cosines.min()),
        }


class Forecasts:
    """Towards the teacher's distribution of the next token: all that a sliced student has in common with it."""

    learning_rate = 1e-4
    together = 8  # held-out sentences: each token has a number for every word
    held_out = 48  # sentences at most: both models read them nine times, which shall cost less than to train

    @staticmethod
    def layer_steps(steps: int) -> int:
        """None: a block of the student is given x in another basis than the teacher's."""
        return 0

    def __init__(self, student: nn.Module, teacher: nn.Module, patterns: Sequence[str] | None):
        self.student, self.teacher = student, teacher
        names = {name: p for name, p in student.named_parameters() if p.is_floating_point()}
        tables = {
            id(module.weight)
            for module in student.modules()
            if isinstance(module, nn.Embedding | RotatedEmbedding)
        }
        if patterns is None:
            self.trained = {name: p for name, p in names.items() if id(p) not in tables}
        else:
            self.trained = _matching(names, patterns)

    def goals(self, batch: dict[str, Tensor]) -> None:
        """None are kept: they are as large as the vocabulary, and made anew each time."""

    @staticmethod
    def told(before: dict, after: dict) -> dict[str, float]:
        """What a report says of the first and the last row of the curve."""
        return {"divergence_before": before["loss"], "divergence_after": after["loss"]}

    def learn(self, batch: dict[str, Tensor], by_layer: bool) -> None:
        """The gradients of one batch, clipped to a norm of 1, in the parameters that are trained."""
        p, q = self._forecasts(batch)
        (functional.kl_div(q, p, reduction="sum", log_target=True) / len(q)).backward()
        nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)

    @torch.no_grad()
    def measure(self, held: list[tuple[dict[str, Tensor], None]]) -> dict[str, float]:
        divergence, agreeing, count = 0.0, 0, 0
        for batch, _ in held:
            p, q = self._forecasts(batch)
            divergence += float(functional.kl_div(q, p, reduction="sum", log_target=True))
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(q)
        return {"loss": divergence / count, "agreement": agreeing / count}

    def _forecasts(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """log p of every word after each token that does not pad, by the teacher and by the student, [tokens, N]."""
        real = batch["attention_mask"].bool()
        with torch.no_grad(), evaluating(self.teacher):
            p = self._logits(self.teacher, "teacher", batch)[real]
        with evaluating(self.student):
            q = self._logits(self.student, "student", batch)[real]
        if p.shape != q.shape:
            raise ValueError(
                f"student: expected logits {list(p.shape)} as from the teacher, got {list(q.shape)}"
            )
        return p.float().log_softmax(-1), q.float().log_softmax(-1)

    @staticmethod
    def _logits(model: nn.Module, argument: str, batch: dict[str, Tensor]) -> Tensor:
        output: Any = model(**batch, use_cache=False)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch["input_ids"].shape:
            raise ValueError(
                f"{argument}: expected a causal language model (logits [B, T, N]) to heal a slicing by, "
                f"got {type(model).__name__}"
            )
        return logits


def _error(y: Tensor, goal: Tensor, mask: Tensor) -> Tensor:
    """‖y − goal‖² / ‖goal − mean goal‖² over real tokens, float32."""
    real = mask[..., None].bool()
    y, goal = y.float().masked_fill(~real, 0), goal.float().masked_fill(~real, 0)
    mean = goal.sum((0, 1)) / mask.sum()
    spread = ((goal - mean) * real).square().sum()
    return (y - goal).square().sum() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def _matching(names: dict[str, nn.Parameter], patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Those of ``names`` that one of a caller's patterns fits; ValueError where none does."""
    chosen = {name: parameter for name, parameter in names.items() if _matches(name, patterns)}
    if not chosen:
        raise ValueError(f"parameters: expected patterns of parameter names, none matches: {list(patterns)}")
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
