"""How the behaviour imagines: the choices that the config makes, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from settings.mapping import Config
from settings.sections import Count, PositiveShare, Section, Share, Weight
from system.errors import ConfigError


@dataclass(frozen=True)
class ImaginationSettings(Section):
    """How the behaviour imagines; most fields are named like their config keys without the `imag_`.

    Raises:
        ConfigError: the choices do not go together; the message says which, and what would.
    """

    RENAMED: ClassVar = {
        **{
            name: f"imag_{name}"
            for name in ("mask", "start", "generated", "reward", "gradient", "gradient_mix", "policy", "imitation")
        },
        **{name: f"imag_{name}" for name in ("nodes", "horizon", "tours", "first", "augment", "penalty", "contacts")},
        "lambda_": "return_lambda",
    }

    mask: Literal["rules", "predicted"] = "rules"
    start: Literal["episodes", "generated", "rows", "replay"] = "episodes"
    generated: PositiveShare = 0.5
    nodes: tuple[int, ...] = ()
    reward: str = "head"
    gradient: Literal["reinforce", "dynamics", "both"] = "reinforce"
    horizon: int | str = "episode"
    tours: Count = 16
    first: Literal["stored", "any"] = "any"
    augment: bool = False
    penalty: Weight = 0.0
    contacts: bool = False
    baseline: Literal["critic", "leave_one_out"] = "leave_one_out"
    discount: PositiveShare = 1.0
    lambda_: Share = 0.95
    target_clip: str | tuple[float, ...] = "auto"
    gradient_mix: Share = 0.1
    policy: Weight = 1.0
    imitation: Weight = 0.0

    @classmethod
    def read(cls, config: Config, name: str) -> Any:
        """The value of one field; texts that stand for numbers as numbers."""
        value = super().read(config, name)
        if name == "horizon":
            return int(value) if value.isdigit() else value
        return _range_or_name(value) if name == "target_clip" else value

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward not in ("head", "simulated") and ":" not in self.reward:
            raise ConfigError(f"imag_reward is {self.reward!r}; choose head, simulated or your own module:function")
        if self.horizon != "episode" and not (isinstance(self.horizon, int) and self.horizon >= 1):
            raise ConfigError(f"imag_horizon is {self.horizon!r}; choose a number of steps, at least 1, or 'episode'")
        if self.baseline == "leave_one_out" and (self.horizon != "episode" or self.tours < 2):
            raise ConfigError(
                "baseline leave_one_out compares whole tours from one start: it needs imag_horizon: episode and"
                f" imag_tours of 2 or more, got {self.horizon} and {self.tours}; or choose baseline: critic"
            )
        if self.gradient != "reinforce" and self.reward != "head":
            raise ConfigError(
                f"imag_gradient {self.gradient} differentiates the reward: it needs imag_reward: head,"
                f" got {self.reward}"
            )
        if self.first == "any" and self.start not in ("episodes", "generated"):
            raise ConfigError(
                "imag_first: any restarts whole tours elsewhere: it needs imag_start: episodes or generated,"
                f" got {self.start}"
            )
        if self.nodes:
            self._require_sizes()
        if self.augment and self.reward != "simulated":
            raise ConfigError(
                "imag_augment assumes that costs are the same under the square's symmetries, which an agent that"
                " learns its costs does not know: it needs imag_reward: simulated"
            )
        self._require_range()

    def _require_sizes(self) -> None:
        if len(self.nodes) != 2 or not 1 <= self.nodes[0] <= self.nodes[1]:
            raise ConfigError(
                f"imag_nodes is {list(self.nodes)}; give the least and the largest number of nodes, such as [20, 200]"
            )
        if self.start != "generated" or self.generated < 1 or self.horizon != "episode":
            raise ConfigError(
                "imag_nodes draws maps of sizes that nobody walks: it needs imag_start: generated, imag_generated: 1.0"
                f" and imag_horizon: episode, got {self.start}, {self.generated:g} and {self.horizon}"
            )

    def _require_range(self) -> None:
        clip = self.target_clip
        if isinstance(clip, str):
            if clip not in ("auto", "none"):
                raise ConfigError(f"target_clip is {clip!r}; choose auto, none or a range such as [-20, 0]")
        elif len(clip) != 2 or clip[0] >= clip[1]:
            raise ConfigError(f"target_clip is {clip}; a range has a lower and an upper bound, such as [-20, 0]")


def _range_or_name(text: str) -> str | tuple[float, ...]:
    """`[-20, 0]` as two numbers; any other text as it stands."""
    if not text.startswith("["):
        return text
    try:
        return tuple(float(part) for part in text.strip("[]").split(","))
    except ValueError as error:
        raise ConfigError(f"target_clip is {text!r}; a range is written as two numbers, such as [-20, 0]") from error
