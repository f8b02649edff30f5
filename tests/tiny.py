"""A method and a data module so small that a whole fit takes a second: the clips move by a shift that is learned."""

import torch
from lightning import LightningDataModule
from torch import distributed, nn
from torch.utils.data import DataLoader

from trackpl.method import Info, Method
from trackpl.types import Clip, Flow, Tracks


class Tiny(Method):
    """Everything moves by one learned shift.

    Args:
        start: the shift to start from, in pixels.
        wait: seconds that each step takes longer, so that it can be killed halfway.
    """

    info = Info(title="Tiny", paper="", licence="Apache-2.0")
    contract = 1

    def __init__(self, start: float = 0.0, wait: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.shift = nn.Parameter(torch.full((2,), float(start)))
        self.wait = wait

    def losses(self, clip: Clip) -> dict[str, torch.Tensor]:
        if self.wait:
            import time

            time.sleep(self.wait)
        loss = (clip.flow.xy.mean((1, 3, 4)) - self.shift).square().sum(1).mean()
        self.log("train/global", loss.detach(), sync_dist=True)
        return {"flow": loss}

    def flow(self, clip: Clip, pairs) -> Flow:
        b, (h, w) = len(clip.video), clip.size
        steps = torch.tensor([t - s for s, t in pairs], device=self.device)
        xy = steps[None, :, None] * self.shift
        return Flow(xy[..., None, None].expand(b, len(pairs), 2, h, w), tuple(pairs))

    def track(self, clip: Clip, queries: torch.Tensor) -> Tracks:
        t = torch.arange(clip.frames, device=self.device)[None, :, None, None]
        xy = queries[:, None, :, 1:] + (t - queries[:, None, :, :1]) * self.shift
        return Tracks(xy, torch.ones(xy.shape[:-1], device=self.device))


class Other(Tiny):
    """The same under another name."""

    def __init__(self, start: float = 0.0, **kwargs) -> None:
        super().__init__(start, **kwargs)


def clip(index: int, size: int = 16, frames: int = 3) -> Clip:
    """Return clip `index`, B = 1: a pure function of its arguments."""
    random = torch.Generator().manual_seed(index)
    shift = torch.tensor([1.0, -0.5]) + 0.2 * torch.randn(2, generator=random)
    video = torch.randint(0, 256, (1, frames, 3, size, size), generator=random, dtype=torch.uint8)
    starts = torch.rand(1, 1, 8, 2, generator=random) * size / 2 + size / 4
    tracks = starts + torch.arange(frames)[None, :, None, None] * shift
    visible = torch.ones(1, frames, 8, dtype=torch.bool)
    xy = shift.view(1, 1, 2, 1, 1).expand(1, 1, 2, size, size).clone()
    valid = torch.ones(1, 1, size, size, dtype=torch.bool)
    return Clip(video, tracks, visible, visible, flow=Flow(xy, ((0, 1),), valid, valid), name=(f"clip{index}",))


class TinyData(LightningDataModule):
    """Clips by index; each rank takes its share of every global batch.

    Args:
        steps: batches an epoch.
        batch_size: clips in a global batch.
        videos: clips to validate on.
    """

    benchmarks = ("toy",)

    def __init__(self, steps: int = 8, batch_size: int = 4, videos: int = 3) -> None:
        super().__init__()
        self.steps, self.batch_size, self.videos = steps, batch_size, videos

    def _loader(self, indices: list[list[int]]) -> DataLoader:
        batches = [Clip.cat([clip(i) for i in batch]) for batch in indices]
        return DataLoader(batches, batch_size=None)

    def _share(self, indices: list[int]) -> list[int]:
        on = distributed.is_available() and distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if on else (0, 1)
        return indices[rank::world]

    def train_dataloader(self) -> DataLoader:
        size = self.batch_size
        return self._loader([self._share([s * size + i for i in range(size)]) for s in range(self.steps)])

    def val_dataloader(self) -> DataLoader:
        return self._loader([[i] for i in self._share([1000 + i for i in range(self.videos)])])

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return self.val_dataloader()
