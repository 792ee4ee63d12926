"""How the behaviour imagines: the choices that the config makes, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from config import Config, UserError


@dataclass(frozen=True)
class ImaginationSettings:
    """How the behaviour imagines; the fields are named like their config keys without the `imag_`.

    Raises:
        UserError: the choices do not go together; the message says which, and what would.
    """

    mask: str = "rules"
    start: str = "episodes"
    generated: float = 0.5
    reward: str = "head"
    gradient: str = "reinforce"
    horizon: int | str = "episode"
    tours: int = 16
    first: str = "any"
    augment: bool = False
    penalty: float = 0.0
    baseline: str = "leave_one_out"
    discount: float = 1.0
    lambda_: float = 0.95
    target_clip: str | tuple[float, ...] = "auto"
    gradient_mix: float = 0.1

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "mask": ("rules", "predicted"),
        "start": ("episodes", "generated", "rows", "replay"),
        "gradient": ("reinforce", "dynamics", "both"),
        "first": ("stored", "any"),
        "baseline": ("critic", "leave_one_out"),
    }

    @classmethod
    def of(cls, config: Config) -> ImaginationSettings:
        """The choices that the keys of a config make.

        Raises:
            UserError: one cannot be read, or they do not go together.
        """
        prefixed = (
            "mask",
            "start",
            "generated",
            "reward",
            "gradient",
            "gradient_mix",
            "tours",
            "first",
            "augment",
            "penalty",
        )
        return cls(
            **{name: config[f"imag_{name}"] for name in prefixed},
            horizon=int(config.imag_horizon) if config.imag_horizon.isdigit() else config.imag_horizon,
            baseline=config.baseline,
            discount=config.discount,
            lambda_=config.return_lambda,
            target_clip=_range_or_name(config.target_clip),
        )

    def __post_init__(self) -> None:
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                key = name if name == "baseline" else f"imag_{name}"
                raise UserError(f"{key} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.reward not in ("head", "simulated") and ":" not in self.reward:
            raise UserError(f"imag_reward is {self.reward!r}; choose head, simulated or your own module:function")
        if self.horizon != "episode" and not (isinstance(self.horizon, int) and self.horizon >= 1):
            raise UserError(f"imag_horizon is {self.horizon!r}; choose a number of steps, at least 1, or 'episode'")
        if self.tours < 1:
            raise UserError(f"imag_tours is {self.tours}; at least 1 trajectory is imagined from each start")
        if not (0 < self.discount <= 1 and 0 <= self.lambda_ <= 1):
            raise UserError(f"discount must lie in (0, 1] and lambda in [0, 1], got {self.discount} and {self.lambda_}")
        if self.baseline == "leave_one_out" and (self.horizon != "episode" or self.tours < 2):
            raise UserError(
                "baseline leave_one_out compares whole tours from one start: it needs imag_horizon: episode and"
                f" imag_tours of 2 or more, got {self.horizon} and {self.tours}; or choose baseline: critic"
            )
        if self.gradient != "reinforce" and self.reward != "head":
            raise UserError(
                f"imag_gradient {self.gradient} differentiates the reward: it needs imag_reward: head,"
                f" got {self.reward}"
            )
        if self.first == "any" and self.start not in ("episodes", "generated"):
            raise UserError(
                "imag_first: any restarts whole tours elsewhere: it needs imag_start: episodes or generated,"
                f" got {self.start}"
            )
        if not 0 < self.generated <= 1:
            raise UserError(f"imag_generated is {self.generated}; it is the share of fresh instances, in (0, 1]")
        if self.augment and self.reward != "simulated":
            raise UserError(
                "imag_augment assumes that costs are the same under the square's symmetries, which an agent that"
                " learns its costs does not know: it needs imag_reward: simulated"
            )
        clip = self.target_clip
        if isinstance(clip, str):
            if clip not in ("auto", "none"):
                raise UserError(f"target_clip is {clip!r}; choose auto, none or a range such as [-20, 0]")
        elif len(clip) != 2 or clip[0] >= clip[1]:
            raise UserError(f"target_clip is {clip}; a range has a lower and an upper bound, such as [-20, 0]")


def _range_or_name(text: str) -> str | tuple[float, ...]:
    """`[-20, 0]` as two numbers; any other text as it stands."""
    if not text.startswith("["):
        return text
    try:
        return tuple(float(part) for part in text.strip("[]").split(","))
    except ValueError as error:
        raise UserError(f"target_clip is {text!r}; a range is written as two numbers, such as [-20, 0]") from error
