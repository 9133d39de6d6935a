"""What it takes that blocks live off the device: how those asked for were found, and bytes moved between tiers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kernels.layout import Tier
from kvpilot.v1 import policy_pb2


@dataclass
class Asked:
    """Blocks, each of one KV head of one layer, that decode steps asked a tier for, by how they were found."""

    there: int = 0
    """Brought for an earlier step and still there."""
    ahead: int = 0
    """Brought for this step before it asked."""
    waited: int = 0
    """Brought only when the step asked, or still under way then."""
    in_place: int = 0
    """Read where they live, for want of room to bring them to."""

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.there + self.ahead + self.waited + self.in_place

    @property
    def hit_rate(self) -> float:
        """Share that was there in time; 1 where none was asked for."""
        return (self.there + self.ahead) / self.blocks if self.blocks else 1.0


@dataclass
class Recalls:
    """Counts of one request's cache, or of a worker's, since it was made; they only rise.

    The host is asked where a stage recalls blocks to a pool on the device, the disk by every step of a request that has
    blocks there. Blocks that kernels read on the host by themselves, as with ``host``, are asked of nobody.
    """

    whole: Recalls | None = field(default=None, repr=False, compare=False)
    """Whose counts take in these."""
    asked: dict[Tier, Asked] = field(default_factory=lambda: {tier: Asked() for tier in (Tier.HOST, Tier.DISK)})
    """By the tier that the blocks live on."""
    moved_bytes: Counter[tuple[Tier, Tier]] = field(default_factory=Counter)
    """Bytes of blocks copied or built, as stored where they go, by the tiers they come from and go to. Sessions between
    their turns are not in it."""
    read_blocks: int = 0
    """Blocks that a query was free to skip, and read."""
    skipped_blocks: int = 0
    """Blocks that a query skipped."""

    def note_asked(self, tier: Tier, there: int = 0, ahead: int = 0, waited: int = 0, in_place: int = 0) -> None:
        """Blocks of a tier were asked for, and found so."""
        asked = self.asked[tier]
        asked.there += there
        asked.ahead += ahead
        asked.waited += waited
        asked.in_place += in_place
        if self.whole:
            self.whole.note_asked(tier, there, ahead, waited, in_place)

    def note_moved(self, origin: Tier, target: Tier, nbytes: int) -> None:
        """Blocks on ``target`` were made of ones on ``origin``."""
        self.moved_bytes[origin, target] += nbytes
        if self.whole:
            self.whole.note_moved(origin, target, nbytes)

    def note_chosen(self, read: int, skipped: int) -> None:
        """A query was free to skip so many blocks in all."""
        self.read_blocks += read
        self.skipped_blocks += skipped
        if self.whole:
            self.whole.note_chosen(read, skipped)

    def to_proto(self) -> policy_pb2.Recalls:
        """The API's form: tiers that were asked and pairs of tiers between which bytes moved."""
        return policy_pb2.Recalls(
            tiers=[
                policy_pb2.TierRecalls(
                    name=tier.name.lower(),
                    there_blocks=asked.there,
                    ahead_blocks=asked.ahead,
                    waited_blocks=asked.waited,
                    in_place_blocks=asked.in_place,
                )
                for tier, asked in self.asked.items()
                if asked.blocks
            ],
            moved=[
                policy_pb2.MovedBytes(from_tier=origin.name.lower(), to_tier=target.name.lower(), bytes=nbytes)
                for (origin, target), nbytes in sorted(self.moved_bytes.items())
            ],
            read_blocks=self.read_blocks,
            skipped_blocks=self.skipped_blocks,
        )

    def summary(self) -> dict[str, float]:
        """All of it by name, for a log."""
        words: dict[str, float] = {
            f"{a.name}_to_{b.name}_bytes".lower(): count for (a, b), count in sorted(self.moved_bytes.items())
        }
        for tier, asked in self.asked.items():
            if asked.blocks:
                name = tier.name.lower()
                words |= {f"{name}_{found}_blocks": count for found, count in vars(asked).items()}
                words[f"{name}_hit_rate"] = round(asked.hit_rate, 3)
        return words
