"""How far a healing is, kept on disk, and what says that two healings are the same."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import torch
from torch import nn

from gaugekit.files.durable import replacing
from gaugekit.files.staging import workplace


class State:
    """The optimizer, the step and the curve; on disk where there is a work folder."""

    def __init__(self, work: str | Path | None, identity: dict, trained: dict[str, nn.Parameter]):
        self.trained, self.step, self.curve = trained, 0, []
        self.optimizer = torch.optim.AdamW(list(trained.values()), weight_decay=0.0)
        self._staged = None if work is None else workplace(work, identity, {})
        if self._staged is None:
            return
        self.file = self._staged.folder / "heal.pt"
        if self.file.is_file():
            try:
                self._load()
            except BaseException:
                self.close()
                raise

    def _load(self) -> None:
        try:
            saved = torch.load(self.file, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"work_directory: {str(self.file)!r} is damaged ({error}); delete its folder"
            ) from error
        self.step, self.curve = saved["step"], saved["curve"]
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(saved["parameters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])

    def close(self) -> None:
        """Lets another process at the work folder."""
        if self._staged is not None:
            self._staged.close()

    def enter(self, first: int) -> None:
        """A stage starts with fresh moments."""
        if self.step == first:
            self.optimizer.state.clear()

    def advance(self, rate: float) -> None:
        """One step of the optimizer with the gradients there are."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self) -> None:
        """Puts all of it on the disk: a kill at any moment leaves the old state or the new."""
        if self._staged is None:
            return
        with replacing(self.file) as file:
            torch.save(
                {
                    "step": self.step,
                    "curve": self.curve,
                    "parameters": {name: tensor.detach() for name, tensor in self.trained.items()},
                    "optimizer": self.optimizer.state_dict(),
                },
                file,
            )


def digest(model: nn.Module) -> str:
    """The SHA-256 of all a model computes with: its configuration, its modules, and the bytes of its tensors."""
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    settings.pop("name_or_path", None)
    digest = hashlib.sha256(json.dumps([settings, str(model)], sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
