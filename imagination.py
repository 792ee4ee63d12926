"""Imagination: trajectories in the world model's latent space, with routing states stepped by the rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from config import Config, UserError
from envs.rules import Instance, State, each_part
from networks import Latent, PointerTables
from views import View, take_nodes
from world_model import Metrics, RoutingContext, WorldModel


@dataclass(frozen=True)
class Imagination:
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
    def of(cls, config: Config) -> Imagination:
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


class Noise(NamedTuple):
    """The randomness of one imagination, drawn beforehand: uniform in [0, 1)."""

    latent: Float[Tensor, "H B Q S"]
    action: Float[Tensor, "H B Q *A"]


class Start(NamedTuple):
    """Where imagination begins: Q trajectories for each of B instances, or replayed sequences.

    `latent` is None where nobody reads it; `context` is None for any task but routing, and `state` for one without
    rules. `weight` is 0 for starts that must not count (rows beyond an episode's end). `belief` is what the model knows
    of hidden costs where all of an instance's trajectories begin; None where it keeps no belief. `mask` is what was
    observed to be legal, of a task without batched rules.
    """

    latent: Latent | None
    state: Any
    context: RoutingContext | None
    weight: Float[Tensor, "B Q"]
    belief: Float[Tensor, "B L"] | None = None
    mask: Bool[Tensor, "B Q N"] | None = None

    @property
    def instance(self) -> Instance | None:
        """The instances of routing; None for any other task."""
        return None if self.context is None else self.context.instance


class Trajectory(NamedTuple):
    """What was imagined from a `Start`: H actions, and the H + 1 states around them.

    `mask` is the mask that the actor was given, `true_mask` the rules' own where there are any; `state` and its
    `features` are of routing only. `alive` is how likely each action is to be taken at all: the start's weight times
    every `cont` before it.
    `log_prob`, `entropy` and `positions` (origin and target of each move) carry a graph, and are there only in
    differentiable imagination.
    """

    feat: Float[Tensor, "B Q H+1 F"] | None
    state: State | None
    mask: Bool[Tensor, "B Q H+1 N"] | None
    true_mask: Bool[Tensor, "B Q H+1 N"] | None
    action: Shaped[Tensor, "B Q H *A"]
    cont: Float[Tensor, "B Q H"]
    alive: Float[Tensor, "B Q H"]
    log_prob: Float[Tensor, "B Q H"] | None
    entropy: Float[Tensor, "B Q H"] | None
    positions: tuple[Tensor, Tensor] | None
    features: Float[Tensor, "B Q H+1 X"] | None = None

    def view(self, steps: slice) -> View | None:
        """What networks see of the states at `steps` beside the latent; None for a task without masks."""
        if self.mask is None:
            return None
        mask = self.mask[:, :, steps]
        if self.state is None:
            return View(mask)
        features = None if self.features is None else self.features[:, :, steps]
        first, current = self.state.first[:, :, :1], self.state.current[:, :, steps]
        return View(mask, first=first, current=current, features=features)


def expand_instance(instance: Instance, shape: torch.Size) -> Instance:
    """A view of B instances for states of shape [B, *Q], as the rules want it. Copies nothing."""
    extra = [1] * (len(shape) - 1)
    return each_part(
        instance, lambda part: part.view(part.shape[0], *extra, *part.shape[1:]).expand(*shape, *part.shape[1:])
    )


def legality(trajectory: Trajectory, *, every_step: bool) -> Metrics:
    """How often actions were illegal, and how well the actor's mask agreed with the rules'.

    The agreement is that of the first step, or of each where the mask is not the rules' own.
    """
    mask, true_mask = trajectory.mask, trajectory.true_mask
    if mask is None or true_mask is None:
        return {}
    legal = true_mask[:, :, :-1].gather(-1, trajectory.action[..., None]).squeeze(-1)
    alive = trajectory.alive
    metrics = {"miss_rate": ((~legal) * alive).sum() / alive.sum()}
    for step in range(mask.shape[2] - 1 if every_step else 1):
        metrics[f"imag_mask_step_{step}"] = (mask[:, :, step] == true_mask[:, :, step]).float().mean()
        metrics[f"imag_legal_step_{step}"] = true_mask[:, :, step].sum(-1).float().mean()
    return metrics


def thin(trajectory: Trajectory, start: Start, count: int, tours: int) -> tuple[Trajectory, Start]:
    """The first `count` instances, and the first of every `tours` trajectories."""

    def part_of(whole: Any) -> Any:
        if whole is None:
            return None
        if isinstance(whole, tuple):
            parts = [part_of(each) for each in whole]
            return type(whole)(*parts) if hasattr(whole, "_fields") else tuple(parts)
        return whole[:count, ::tours]

    context = start.context
    if context is not None:
        instance = each_part(context.instance, lambda part: part[:count])
        context = type(context)(instance=instance, nodes=context.nodes[:count])
    return part_of(trajectory), start._replace(context=context)


def imagine(
    model: WorldModel,
    actor: nn.Module,
    *,
    start: Start,
    tables: PointerTables | None,
    noise: Noise | None,
    horizon: int,
    mask: str = "rules",
    differentiable: bool = False,
) -> Trajectory:
    """Let the actor act for `horizon` steps: the RSSM predicts the latent, the rules step the routing state.

    Args:
        model: predicts latents, and masks where `mask` is "predicted".
        actor: any of `networks`' actors.
        start: where to begin.
        tables: the pointer's tables of the start's instances.
        noise: what to sample with; None takes the mode of actor and prior instead.
        horizon: steps to take, at most: where every episode has ended before, no more are taken.
        mask: "rules", or "predicted" to decode the actor's mask from the latent; the true state is stepped in both.
        differentiable: keep the graph through latents and moves (straight-through); needs a latent and noise.
    """
    rules, context, state = model.rules, start.context, start.state
    # Where episodes differ in length the last steps are often nobody's. Only a CPU can be asked without waiting for it.
    varied = context is not None and context.instance.valid is not None
    may_end_early = rules is not None and (varied or not rules.fixed_length) and start.weight.device.type == "cpu"
    all_finished = False
    known: Any = rules or model.task.mask_rules
    shape = start.weight.shape
    latent = None if start.latent is None else Latent(*(part.flatten(0, 1) for part in start.latent))
    origin = None
    if differentiable and context is not None:
        origin = take_nodes(context.instance.coords, state.current)
    feats, states, masks, true_masks, actions, conts = [], [], [], [], [], []
    features: list[Tensor] = []
    log_probs, entropies, origins, targets = [], [], [], []
    with torch.set_grad_enabled(differentiable):
        for step in range(horizon + 1):
            view = None
            if latent is not None:
                feats.append(latent.feat().unflatten(0, shape))
            if model.task.actions.masked:
                if state is not None:
                    true_masks.append(known.action_mask(state))
                if mask == "rules":
                    masks.append(true_masks[-1])
                elif step == 0 and start.mask is not None:
                    masks.append(start.mask)
                else:
                    masks.append(model.predict_mask(feats[-1], context))
                view = View(masks[-1])
            if rules is not None:
                states.append(state)
                view = View.of(rules, state, masks[-1])
                if view.features is not None:
                    features.append(view.features)
            if step == horizon or all_finished:
                break
            # The score of an action is not differentiated through the latents that led to it.
            dist = actor(feats[-1].detach() if feats else None, tables, view)
            action = dist.mode() if noise is None else dist.sample(noise.action[step])
            actions.append(action)
            embedded = None
            if differentiable:
                log_probs.append(dist.log_prob(action))
                entropies.append(dist.entropy())
                embedded = dist.embed(action)
                if origin is not None and context is not None:
                    origins.append(origin)
                    origin = embedded @ context.instance.coords
                    targets.append(origin)
                    embedded = embedded @ context.nodes
            elif latent is not None:
                embedded = model.embed_action(action, context)
            if latent is not None and embedded is not None:
                latent_noise = None if noise is None else noise.latent[step].flatten(0, 1)
                latent = model.rssm.imagine_step(latent, embedded.flatten(0, 1), latent_noise)
            if rules is not None:
                state, finished = rules.step(state, action)
                conts.append((~finished).float())
                all_finished = may_end_early and bool(finished.all())
            elif state is not None:
                state = known.step(state, action)

    def stack(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, 2)

    def stack_part(parts: tuple[Tensor, ...]) -> Tensor:
        # What no move changes is the same tensor throughout: a view of it takes no memory.
        if all(part is parts[0] for part in parts):
            return parts[0].unsqueeze(2).expand(*shape, len(parts), *parts[0].shape[2:])
        return stack(list(parts))

    feat = stack(feats) if feats else None
    if rules is not None:
        cont = stack(conts)
    else:
        assert feat is not None, "a task without routing rules is imagined in latents"
        with torch.set_grad_enabled(differentiable):
            cont = model.predict_cont(feat[:, :, 1:])
    # An action is taken if its start counts and every step before it let the episode go on.
    survival = torch.cat((start.weight[..., None], cont[:, :, :-1].detach()), -1).cumprod(-1)
    return Trajectory(
        feat=feat,
        state=type(states[0])(*(stack_part(part) for part in zip(*states, strict=True))) if states else None,
        mask=stack(masks) if masks else None,
        true_mask=stack(true_masks) if true_masks else None,
        action=stack(actions),
        cont=cont,
        alive=survival,
        log_prob=stack(log_probs) if differentiable else None,
        entropy=stack(entropies) if differentiable else None,
        positions=(stack(origins), stack(targets)) if origins else None,
        features=stack(features) if features else None,
    )
