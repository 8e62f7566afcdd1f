"""What the codec and the reader of the scenes are made of."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from rcm_mcore.lab.scenes import CANVAS, FRAMES

_LEARNING_RATE = 1e-3  # at its largest


class Block(nn.Module):
    """Two convolutions beside the identity, which is what it is at first: [m, width, H, W] to the same.

    With `groups` the rows are groups of frames, as many to a video, and the first convolution sees those before and after.
    """

    def __init__(self, width: int, *, groups: int = 0) -> None:
        super().__init__()
        self.groups = groups
        self.inner = nn.Conv2d(3 * width if groups else width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(x)
        if self.groups:
            padded = functional.pad(y.unflatten(0, (-1, self.groups)), (0, 0, 0, 0, 0, 0, 1, 1))
            y = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], 2).flatten(0, 1)
        return x + self.outer(functional.silu(self.inner(y)))


def mixed(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Matrix products and convolutions in bfloat16 on a GPU, in the dtype of their operands elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def descend(parameters: Iterable[nn.Parameter], losses: Iterable[Tensor], *, steps: int, label: str, show: bool = True) -> None:
    """Takes an AdamW step on each of `steps` losses, with warm-up, cosine decay to nothing and a progress bar.

    Args:
        losses: lazy, so that each is computed with the parameters that the last step left.
        label: of the bar.
        show: whether there is a bar, where there is a terminal.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    with tqdm(total=steps, desc=label, unit="step", disable=None if show else True, dynamic_ncols=True) as bar:
        for step, loss in enumerate(losses, start=1):
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 50 == 0:  # now and then: reading a number waits for the GPU
                bar.set_postfix(loss=f"{loss.item():.4f}")


def check_videos(videos: Tensor) -> None:
    """Raises: ValueError unless videos are [n, 3, 17, 64, 64] with n >= 1."""
    if tuple(videos.shape[1:]) != (3, FRAMES, CANVAS, CANVAS) or not len(videos):
        raise ValueError(f"videos: shape {list(videos.shape)}; expected [n, 3, {FRAMES}, {CANVAS}, {CANVAS}] with n >= 1")
