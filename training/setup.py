"""From a config to its task, environments to train in and an evaluator; what cannot work is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium
import torch
from gymnasium.vector import VectorEnv

from config import Config, ConfigError
from envs.candidates import candidate_spec
from envs.crashes import EnvironmentCrashed, Restarts
from envs.dynamics_map import DynamicsMapContext
from envs.gym_tasks import make_gym
from envs.gym_vector import GymVectorEnv
from envs.routing import RULES
from envs.spaces import action_spec, left_out, observation_keys
from envs.tasks import ObservationTask, RoutingTask
from envs.translation import RoutingTranslation, SpacesTranslation, Translation
from envs.vector import RoutingVectorEnv
from language.task import TextTask
from routing.cases import field_cases
from routing.cost_world import Costs
from routing.costs import EUCLIDEAN, find_costs
from routing.frame import Frame
from routing.instances import TEST_SEED, VALIDATION_SEED
from routing.logged_costs import logged_costs
from routing.rules import MIN_NODES, Rules, single_precision
from routing.street_costs import StreetCosts
from settings.dreamer import LossScales
from settings.environment import GYM_PREFIX, SUITE_PREFIXES, WrapperSettings
from settings.language import TEXT, LanguageSettings
from settings.run import EvaluationSettings, ObservationSettings, RunSettings, TaskSettings
from system.ranks import here
from system.terminal import tell
from training.agent import AgentClass, Trained
from training.episodes import GymEvaluator
from training.evaluation import Evaluator
from training.texts import TextEvaluator
from training.tours import Evaluation, RoutingEvaluator
from training.trips import TripEvaluator, TripLog, read_log

# The value of eval_env that evaluates in the environments of training.
TRAINING_ENV = "training"
# An environment of somebody else's, or several that are stepped together.
OneOrMany = gymnasium.Env | VectorEnv


def make_evaluation(num_nodes: int, count: int, *, seed: int, rules: type[Rules] = RULES["tsp"]) -> Evaluation:
    """The first `count` cases that `seed` gives, with what the best solutions known cost in the rules' world."""
    (instance, factors), costs = field_cases(rules, count, num_nodes, seed=seed), rules.costs
    # The reference is of the positions as they were drawn, in double precision.
    if costs.name == EUCLIDEAN.name:
        references = rules.reference_lengths(instance)
    else:
        references = rules.reference_costs(instance, costs.matrix(instance, factors).numpy())
    factors = None if factors is None else factors.float()
    return Evaluation(single_precision(instance), references=references, factors=factors)


class Setup(NamedTuple):
    """A task of some kind, and what stands for it: environments to train in, and an evaluator once the agent is there.

    `close` ends the environments. Where a log of trips is learnt from, `read_log` reads it, and the environments are of
    use only if their costs are known. `translation` stands between an environment of others and the agent; None where
    there is no environment. `make_source` makes the `Source` of a run that learns from neither of these.
    """

    task: Any
    make_env: Callable[[dict[str, torch.Generator]], RoutingVectorEnv | GymVectorEnv]
    make_evaluator: Callable[[Any], Evaluator]
    close: Callable[[], None]
    read_log: Callable[[], TripLog] | None = None
    translation: Translation | None = None
    make_source: Callable[[], Any] | None = None


def make_setup(
    config: Config,
    device: torch.device,
    *,
    frame: Frame | None = None,
    env: OneOrMany | None = None,
    idle: bool = False,
) -> Setup:
    """What the config's `task` names.

    Args:
        config: of a run.
        device: where it learns or plays.
        frame: between a log's units and the model's, of a run that has learnt from one; None for a new run.
        env: an environment of a gymnasium task, whose spaces say all; none is made then, nor can be.
        idle: whether the environments are stepped elsewhere, so that one is enough to ask.

    Raises:
        UserError: there is no such task, or no agent can play it.
    """
    settings = RunSettings.of(config)
    task = settings.task.task
    if task in RULES:
        if settings.task.trips:
            return _logged_setup(settings, device, frame=frame)
        return _routing_setup(settings, device, knows_coords=bool(LossScales.of(config).coords))
    if settings.task.is_gym:
        return _gym_setup(settings, device, idle=idle) if env is None else _setup_by(settings, env)
    if task == TEXT:
        return _text_setup(settings, LanguageSettings.of(config))
    raise ConfigError(
        f"task is {task!r}; choose one of {', '.join(RULES)}, or {GYM_PREFIX}ID for a gymnasium environment"
        f" such as {GYM_PREFIX}CartPole-v1, or one of a suite ({', '.join(SUITE_PREFIXES)}: docs/suites.md);"
        f" or {TEXT} for prompts (grpo.py)"
    )


def make_task(config: Config) -> RoutingTask:
    """The routing task that the config names.

    Raises:
        ConfigError: it names another.
    """
    return _task_of(TaskSettings.of(config))


def _task_of(settings: TaskSettings) -> RoutingTask:
    if settings.task not in RULES:
        raise ConfigError(f"task is {settings.task!r}; choose one of {', '.join(RULES)}")
    world = find_costs(settings.cost, shown=settings.cost_shown, streets=settings.streets, layout=settings.layout)
    return _task_in(world, settings)


def _task_in(world: Costs, settings: TaskSettings) -> RoutingTask:
    return RoutingTask.of(RULES[settings.task].under(world), settings.nodes)


def _routing_setup(settings: RunSettings, device: torch.device, *, knows_coords: bool) -> Setup:
    """`knows_coords` is whether a head of the world model predicts the positions of all nodes."""
    task, nodes, evaluation = _task_of(settings.task), settings.task.nodes, settings.evaluation
    curriculum = _curriculum(settings.task)
    if curriculum and knows_coords:
        raise ConfigError("curriculum needs model.loss_scales.coords: 0; that head knows one number of nodes")

    def make_env(generators: dict[str, torch.Generator]) -> RoutingVectorEnv:
        return RoutingVectorEnv(
            task.rules,
            num_envs=settings.environments.envs,
            num_nodes=nodes,
            curriculum=curriculum,
            device=device,
            generator=generators["environment"],
        )

    def make_evaluator(pictures: Any) -> RoutingEvaluator:
        return _tour_evaluator(task, evaluation, device, pictures)

    return Setup(task, make_env, make_evaluator, close=lambda: None, translation=RoutingTranslation(task.rules))


def _text_setup(settings: RunSettings, language: LanguageSettings) -> Setup:
    task, evaluation = TextTask.of(language), settings.evaluation

    def make_env(generators: dict[str, torch.Generator]) -> RoutingVectorEnv:
        raise AssertionError("prompts have no environment")

    def make_evaluator(pictures: Any) -> TextEvaluator:
        return TextEvaluator(task, valid_instances=evaluation.valid_instances, eval_instances=evaluation.eval_instances)

    return Setup(task, make_env, make_evaluator, close=lambda: None)


def evaluator_elsewhere(home: Setup, config: Config, device: torch.device) -> Evaluator:
    """What judges a run on other streets than its own, where it knows nothing of places but where they lie.

    Args:
        home: of the run.
        config: of the run, but with the streets to play on.
        device: where the agent plays.

    Raises:
        UserError: the run is of no world of streets, or there are none.
    """
    settings = RunSettings.of(config)
    if settings.task.trips:
        raise ConfigError("a run that has learnt from trips is judged on the map of its log alone; leave --streets out")
    streets, own = _task_of(settings.task).rules.costs, home.task
    assert isinstance(own, RoutingTask) and isinstance(streets, StreetCosts), "no other world has streets"
    assert isinstance(own.rules.costs, StreetCosts)
    seen = streets.seen_from(own.rules.costs)
    if seen.foreign:
        tell(f"places of {settings.task.streets} are unknown to the run, which goes by where they lie alone")
    return _tour_evaluator(_task_in(seen, settings.task), settings.evaluation, device, None)


def _tour_evaluator(
    task: RoutingTask, settings: EvaluationSettings, device: torch.device, pictures: Any
) -> RoutingEvaluator:
    nodes = task.num_actions
    return RoutingEvaluator(
        task,
        validation=make_evaluation(nodes, settings.valid_instances, seed=VALIDATION_SEED, rules=task.rules),
        test=make_evaluation(nodes, settings.eval_instances, seed=TEST_SEED, rules=task.rules),
        device=device,
        pictures=pictures,
        players=settings.players,
        planned=settings.plan_instances,
    )


def _logged_setup(settings: RunSettings, device: torch.device, *, frame: Frame | None) -> Setup:
    """Of a run that learns from a log; the log itself is read only if somebody needs it."""
    world = _task_of(settings.task).rules.costs if settings.task.knows_costs else None

    @functools.cache
    def log() -> TripLog:
        return read_log(settings.task, world=world, frame=frame, device=device)

    costs = world
    if costs is None:
        known = frame or log().frame
        assert known is not None, "where nobody knows the world, its log has a frame"
        costs = logged_costs(known)
    task = _task_in(costs, settings.task)

    def make_env(generators: dict[str, torch.Generator]) -> RoutingVectorEnv:
        return RoutingVectorEnv(
            task.rules,
            num_envs=settings.environments.envs,
            num_nodes=task.num_actions,
            device=device,
            generator=generators["environment"],
        )

    def make_evaluator(pictures: Any) -> TripEvaluator:
        tours = None if world is None else _tour_evaluator(task, settings.evaluation, device, pictures)
        return TripEvaluator(log(), tours)

    translation = RoutingTranslation(task.rules)
    return Setup(task, make_env, make_evaluator, close=lambda: None, read_log=log, translation=translation)


def _curriculum(settings: TaskSettings) -> list[tuple[int, int | None]]:
    """The stages that the config names: nodes, and env steps or None for ever.

    Raises:
        ConfigError: they are none.
    """
    stages, last = list(settings.curriculum), len(settings.curriculum) - 1
    for index, stage in enumerate(stages):
        whole = isinstance(stage, tuple) and len(stage) == 2 and all(type(part) in (int, type(None)) for part in stage)
        nodes, steps = stage if whole else (None, None)
        if nodes is None or not MIN_NODES <= nodes <= settings.nodes or (steps is None) != (index == last):
            raise ConfigError(
                f"curriculum has the stage {stage}; each is [nodes, env steps] with {MIN_NODES} to {settings.nodes}"
                " nodes (the key nodes), and the last [nodes, null]"
            )
        if steps is not None and steps < 1:
            raise ConfigError(f"curriculum has a stage of {steps} env steps; it needs 1 at least")
    if stages and stages[-1][0] != settings.nodes:
        raise ConfigError(
            f"curriculum ends with {stages[-1][0]} nodes, the key nodes is {settings.nodes}: make them the same"
        )
    return stages


def _gym_setup(settings: RunSettings, device: torch.device, *, idle: bool) -> Setup:
    environments, evaluation = settings.environments, settings.evaluation
    make_env = make_one(settings.task, settings.wrappers)
    # The environments are made at once, so that a mistake in them shows before anything else is done.
    options = {
        "processes": environments.processes,
        "timeout": environments.timeout,
        # The environments of evaluations count, too.
        "restarts": Restarts(allowed=environments.restarts),
        **reading_of_observations(settings.observations),
    }
    make_training = make_one(settings.task, settings.wrappers, training=True)
    env = GymVectorEnv(
        make_training,
        num_envs=1 if idle else environments.envs,
        first_row=here().index * environments.envs,
        device=device,
        seed=settings.machine.seed,
        **options,
    )
    _require_mask_rules(env)
    task = ObservationTask(
        actions=env.actions,
        observations=env.observations,
        mask_rules=env.mask_rules,
        candidates=candidate_spec(env.spaces[0], env.actions),
        left_out=tuple(env.left_out.items()),
    )

    def make_evaluator(pictures: Any) -> GymEvaluator:
        return GymEvaluator(
            make_env,
            valid_episodes=evaluation.valid_episodes,
            eval_episodes=evaluation.eval_episodes,
            most_envs=environments.envs,
            device=device,
            training_env=env if evaluation.eval_env == TRAINING_ENV else None,
            pictures=pictures,
            **options,
        )

    translation = SpacesTranslation(*env.spaces, zero_keys=settings.observations.zero_keys)
    return Setup(task, lambda _generators: env, make_evaluator, close=env.close, translation=translation)


def _setup_by(settings: RunSettings, env: OneOrMany) -> Setup:
    """Of a task whose environment somebody else has made: what it shows and takes, and nothing to play in."""
    # Of many at once, gymnasium tells the spaces of each under these names.
    space = getattr(env, "single_observation_space", env.observation_space)
    action_space = getattr(env, "single_action_space", env.action_space)
    wanted = reading_of_observations(settings.observations)["wanted_keys"]
    actions = action_spec(action_space, space)
    task = ObservationTask(
        actions=actions,
        observations=observation_keys(space, wanted=wanted),
        mask_rules=_mask_rules(env),
        candidates=candidate_spec(space, actions),
        left_out=tuple(left_out(space).items()),
    )

    def nowhere(_: Any) -> Any:
        raise AssertionError("nothing is played in an environment that belongs to somebody else")

    translation = SpacesTranslation(space, action_space, zero_keys=settings.observations.zero_keys)
    return Setup(task, nowhere, nowhere, close=lambda: None, translation=translation)


def make_one(
    task: TaskSettings, wrappers: WrapperSettings, *, render_mode: str | None = None, training: bool = False
) -> Callable[[], gymnasium.Env]:
    """What makes the task's gymnasium environment, with its wrappers and its context."""
    make_plain = make_gym(
        task.task, imports=task.imports, render_mode=render_mode, settings=wrappers, training=training
    )
    return make_plain if task.context == "none" else lambda: DynamicsMapContext(make_plain())


def reading_of_observations(settings: ObservationSettings) -> dict[str, Any]:
    """Which keys have to be read, which numbers that are not finite are set to 0, and which end their episode.

    See `GymVectorEnv`, whose arguments these are.
    """
    wanted = (settings.encode_keys, settings.decode_keys)
    return {"wanted_keys": wanted, "zero_keys": settings.zero_keys, "drop_keys": settings.drop_keys}


def _mask_rules(env: OneOrMany) -> Any:
    """The rules that an environment gives for its mask; None where it gives none."""
    first = env
    if isinstance(env, VectorEnv):
        # Those in processes of their own keep theirs there.
        first = getattr(env.unwrapped, "envs", [env])[0]
    return getattr(first.unwrapped, "mask_rules", None)


def _require_mask_rules(env: GymVectorEnv) -> None:
    """Check that the rules an environment gives for its mask, if any, have their methods, and a mask to be about.

    Raises:
        ConfigError: a method is missing, or the actions are not masked.
    """
    if env.mask_rules is None:
        return
    missing = [name for name in ("restore", "action_mask", "step") if not callable(getattr(env.mask_rules, name, None))]
    problem = f"have no {', '.join(missing)}" if missing else "are given, but no action_mask is observed"
    if missing or not env.actions.masked:
        env.close()
        raise ConfigError(f"the environment's mask_rules {problem}; docs/your-environment.md says what they need")


def require_room(settings: RunSettings, least: dict[str, int], *, what: str) -> None:
    """Check that the keys of `least` are no smaller than that; all that are are told at once, with what would do.

    Raises:
        ConfigError: one is smaller.
    """
    has = {"prefill": settings.loop.prefill, "replay_capacity": settings.loop.replay_capacity}
    short = {key: needed for key, needed in least.items() if has[key] < needed}
    if short:
        given = " and ".join(f"{key} is {has[key]}" for key in short)
        add = " ".join(f"--{key} {needed}" for key, needed in short.items())
        raise ConfigError(f"{given}; {settings.environments.envs} environments need more for {what}: add {add}")


def require_task(task: Any, make_agent: AgentClass, config: Config) -> None:
    """Check that an agent of this class can be made for a task.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(task, make_agent.tasks):
        other = "python grpo.py completes prompts" if config.task == TEXT else "python dreamer.py and sac.py play it"
        raise ConfigError(f"task is {config.task!r}, which is not for this program; {other}")


def require_players(settings: RunSettings, agent: Trained) -> None:
    """Check that the agent can play as it is to play.

    Raises:
        ConfigError: it cannot.
    """
    wanted = {"act": [settings.loop.act], "eval_by": settings.evaluation.players}
    for key, names in wanted.items():
        if missing := set(names) - set(agent.players):
            raise ConfigError(
                f"{key} asks for {missing.pop()}, and this agent plays by {', '.join(agent.players)} alone: planning"
                " takes the dreamer, task tsp or cvrp, model.loss_scales.reward above 0 and model.reward_latent: false"
            )


@contextmanager
def telling_of_crashes() -> Iterator[None]:
    """Print an environment's own traceback where there is no logdir yet to save it in."""
    try:
        yield
    except EnvironmentCrashed as error:
        tell(error.crash.trace.rstrip())
        raise
