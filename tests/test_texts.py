import json
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo
from benchmarks.flags import CONFIGS
from config import ConfigError, load
from groups.texts import TextSampler
from language.prompts import Example
from logits import StableLogitsProcessor, TemperatureLogitsWarper
from tests.group_scenes import trainer
from training.setup import make_setup

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SMALL = {"language.width": 16, "language.heads": 2, "language.layers": 1, "groups.prompts": 6, "groups.samples": 4}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_trainer(**changes: Any) -> grpo.GRPO:
    return trainer("grpo_words", **{**SMALL, **changes})


def text_sampler(**changes: Any) -> TextSampler:
    sampler = text_trainer(**changes).sampler
    assert isinstance(sampler, TextSampler)
    return sampler


def draw(sampler: TextSampler, groups: int = 6, samples: int = 4) -> Any:
    return sampler.draw(groups, samples, generator=generator(1), environment=generator(2))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Of three lengths, so that some are padded."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "ab" * (1 + number % 3) + chr(97 + number % 26), "answer": "ba"} for number in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_samples_of_a_group_have_one_prompt_and_are_judged_by_its_answer():
    sampler = text_sampler(**{"language.most_tokens": 6})
    samples = draw(sampler)
    tokens = samples.decisions.tokens.view(6, 4, -1)
    length = tokens.shape[-1] - samples.decisions.action.shape[-1]
    assert torch.equal(tokens[:, :1, :length].expand(-1, 4, -1), tokens[..., :length])
    for group in range(6):
        (prompt,) = set(sampler.tokenizer.batch_decode(tokens[group, :, :length], skip_special_tokens=True))
        answer = "".join(sorted(prompt.removesuffix(":")))
        texts = sampler.tokenizer.batch_decode(samples.decisions.action[group], skip_special_tokens=True)
        assert samples.reward[group].tolist() == pytest.approx([sampler.task.reward(prompt, t, answer) for t in texts])


def test_nothing_counts_behind_the_end_of_a_completion():
    sampler = text_sampler(**{"language.most_tokens": 12})
    samples = draw(sampler, 30)
    action, end = samples.decisions.action, sampler.tokenizer.eos_token_id
    ended = (action == end).int().cumsum(-1)
    behind = (ended - (action == end).int()) > 0
    assert behind.any() and torch.equal(samples.counted, (~behind).float())
    assert bool((action[behind] == sampler.tokenizer.pad_token_id).all())
    assert bool((samples.log_prob[behind] == 0).all())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_training_are_those_of_sampling(temperature, prompts):
    sampler = text_sampler(
        **{"language.temperature": temperature, "language.prompts": prompts, "language.most_tokens": 8}
    )
    samples = draw(sampler, 250)
    scored = sampler.score(sampler.policy, samples.decisions)
    apart = (scored.log_prob - samples.log_prob).abs() * samples.counted
    assert samples.reward.numel() == 1000 and float(apart.detach().max()) < 1e-5


def test_log_probabilities_are_those_of_a_row_without_padding(prompts):
    sampler = text_sampler(**{"language.prompts": prompts})
    samples = draw(sampler, 6, 2)
    log_prob = sampler.score(sampler.policy, samples.decisions).log_prob.flatten(0, 1)
    tokens, attended = samples.decisions.tokens, samples.decisions.attended
    begins = (attended.cumsum(-1) == 0).sum(-1)
    assert len(begins.unique()) > 1
    for row, begin in enumerate(begins.tolist()):
        alone = sampler.policy(input_ids=tokens[row : row + 1, begin:]).logits[0]
        steps = samples.decisions.action.shape[-1]
        expected = sampler.distribution(alone[-steps - 1 : -1]).log_prob(samples.decisions.action.flatten(0, 1)[row])
        counts = samples.counted.flatten(0, 1)[row].bool()
        torch.testing.assert_close(log_prob[row][counts], expected[counts], rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_as_the_processors_would_have_generate_draw_them():
    sampler = text_sampler(**{"language.temperature": 0.7, "language.min_prob": 1e-4})
    logits = 20 * torch.randn(50, 12, generator=generator(3))
    logits[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    warper = TemperatureLogitsWarper(0.7)
    nothing = torch.zeros(50, 1, dtype=torch.long)
    processed = warper(nothing, StableLogitsProcessor(30.0, 1e-4)(nothing, logits))
    torch.testing.assert_close(sampler.distribution(logits).probs, torch.softmax(processed, -1), rtol=1e-4, atol=1e-7)


def test_a_model_in_its_own_format_is_gone_on_with(tmp_path):
    first = text_sampler()
    first.save_pretrained(tmp_path / "model")
    again = text_sampler(seed=5, **{"language.model": tmp_path / "model"})
    assert all(torch.equal(value, again.weights()[name]) for name, value in first.weights().items())
    example = [Example("dcba:", "abcd")]
    assert first.complete(example) == again.complete(example)


def test_gradients_are_the_same_for_a_few_rows_at_once():
    whole, parts = text_sampler(), text_sampler(**{"language.rows_at_once": 5})
    parts.load_weights(whole.weights())
    decisions = draw(whole).decisions
    gradients = []
    for sampler in (whole, parts):
        scored = sampler.score(sampler.policy, decisions)
        (scored.log_prob * torch.arange(24).view(6, 4, 1) + scored.entropy).sum().backward()
        gradients.append({name: value.grad for name, value in sampler.weights().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-3)


def test_temperature_divides_log_probabilities():
    warm, cold = (text_sampler(**{"language.temperature": value}).distribution for value in (1.0, 0.5))
    logits = torch.randn(3, 12, generator=generator(3))
    expected = torch.log_softmax(2 * warm(logits).log_probs, -1)
    torch.testing.assert_close(cold(logits).log_probs, expected, rtol=1e-4, atol=1e-4)


def test_completing_takes_the_likeliest_token():
    sampler = text_sampler()
    (first, again), example = (sampler.complete([Example("abcd:", "abcd")] * 2), Example("abcd:", "abcd"))
    assert first == again and first.example == example


def test_every_weight_of_the_language_model_learns():
    ours = text_trainer(**{"language.most_tokens": 8, "groups.kl": 0.1})
    before = {name: value.clone() for name, value in ours.sampler.weights().items()}
    for _ in range(2):
        ours.practise(progress=0.0)
    still = [name for name, value in ours.sampler.weights().items() if torch.equal(value, before[name])]
    assert still == []


def test_weights_that_are_shared_are_saved_once_and_taken_back():
    ours, theirs = text_sampler(), text_sampler(seed=1)
    assert "lm_head.weight" not in ours.weights() and "transformer.wte.weight" in ours.weights()
    with torch.no_grad():
        for value in theirs.weights().values():
            value.normal_()
    ours.load_weights(theirs.weights())
    assert all(torch.equal(value, theirs.weights()[name]) for name, value in ours.weights().items())


def break_logits(_module: Any, _inputs: Any, output: Any) -> Any:
    """Put every kind of fault into every row."""
    faults = torch.tensor([float("nan"), float("inf"), -float("inf"), 150.0, -150.0])
    faults = faults.expand(*output.logits.shape[:-1], 5)
    output.logits = torch.cat((faults, output.logits[..., 5:]), -1)
    return output


def test_faulty_logits_are_sampled_learnt_from_and_counted():
    ours = text_trainer()
    sampler = ours.sampler
    sampler.policy.register_forward_hook(break_logits)
    metrics, _ = ours.practise(progress=0.0)
    assert metrics["logits_nan_max"] > 0 and metrics["logits_inf_max"] > 0
    assert float(metrics["policy_skips_max"]) == 0 and metrics["policy_grad_norm"].isfinite()
    assert all(bool(value.isfinite().all()) for value in sampler.weights().values())


def test_prompts_that_are_too_long_for_a_model_are_refused(tmp_path):
    text_sampler().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"the longest prompt has 5 tokens and language.most_tokens is 90"):
        text_sampler(**{"language.model": tmp_path / "model", "language.most_tokens": 90})


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_without_a_model_is_refused_in_one_line(content, tmp_path):
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="which cannot be loaded") as error:
        text_sampler(**{"language.model": folder})
    assert "\n" not in str(error.value)


def test_code_of_a_model_is_not_run(tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    text_sampler().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ConfigError, match="which cannot be loaded"):
        text_sampler(**{"language.model": folder})
    assert not mark.exists()


def test_weights_in_a_pickle_are_refused(tmp_path):
    folder = tmp_path / "model"
    sampler = text_sampler()
    sampler.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(sampler.policy.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="in safetensors"):
        text_sampler(**{"language.model": folder})


def test_text_is_for_grpo_alone(tmp_path, capsys):
    import dreamer

    with pytest.raises(SystemExit):
        dreamer.main(["--task", "text", "--logdir", str(tmp_path / "run")])
    assert "python grpo.py completes prompts" in capsys.readouterr().err


@pytest.mark.run
def test_code_of_a_reward_is_run_only_where_the_user_names_it(tmp_path, capsys):
    options = ["--configs", "grpo_words", "debug", "--logdir", str(tmp_path), "--steps", "24", "--eval_every", "0"]
    options += [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    grpo.main([*options, "--language.reward", "tests.test_prompts:half"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        grpo.main(["--evaluate", str(tmp_path)])
    assert "names code: language.reward is 'tests.test_prompts:half'" in capsys.readouterr().err
    grpo.main(["--evaluate", str(tmp_path), "--trust", "true"])
    assert "mean reward 0.5" in capsys.readouterr().out


@pytest.mark.run
def test_a_run_learns_goes_on_exactly_and_leaves_a_model_in_its_own_format(tmp_path, capsys):
    options = ["--configs", "grpo_words", "--language.width", "32", "--device", "cpu", "--eval_every", "1024"]
    options += ["--valid_instances", "32", "--eval_instances", "32", "--log_every", "512", "--groups.epochs", "2"]
    options += [
        "--groups.prompts",
        "16",
        "--schedule.decay_from",
        "1",
        "--groups.kl",
        "0.01",
        "--actor.entropy_final",
        "1e-2",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    grpo.main([*options, "--steps", "3072", "--checkpoint_every", "1024", "--logdir", str(whole)])
    grpo.main([*options, "--steps", "2048", "--checkpoint_every", "1024", "--logdir", str(parts)])
    grpo.main(
        [
            *options,
            "--steps",
            "3072",
            "--checkpoint_every",
            "1024",
            "--logdir",
            str(tmp_path / "again"),
            "--resume",
            str(parts / "latest.pt"),
        ]
    )
    weights = [
        torch.load(folder / "latest.pt", weights_only=True)["state"]["agent"]["policy"]
        for folder in (whole, tmp_path / "again")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    returns = [row["train_return"] for row in rows if "train_return" in row]
    assert returns[-1] > returns[0] + 0.02 and "eval_reward" in rows[-1] and "eval_exact" in rows[-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")
    saved = dict(model.named_parameters())
    assert all(torch.equal(value, saved[name]) for name, value in weights[0].items())
    settings = load(CONFIGS, ["grpo", "grpo_words"], {"language.model": str(whole / "model")})
    assert make_setup(settings, CPU).task.name == "sorted_letters"


def run(*options: str) -> None:
    small = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    grpo.main(["--configs", "grpo_words", "debug", *small, "--eval_every", "0", "--device", "cpu", *options])


@pytest.mark.run
def test_a_run_that_began_with_a_loaded_model_goes_on_and_is_evaluated(tmp_path, capsys):
    text_sampler().save_pretrained(tmp_path / "model")
    options = ("--language.model", str(tmp_path / "model"), "--logdir", str(tmp_path / "run"))
    run(*options, "--steps", "48")
    run(*options, "--steps", "96")
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 96
    capsys.readouterr()
    grpo.main(["--evaluate", str(tmp_path / "run")])
    assert "held-out prompts, mean reward" in capsys.readouterr().out


@pytest.mark.run
def test_a_run_does_not_go_on_with_other_prompts(tmp_path, capsys):
    run("--logdir", str(tmp_path), "--steps", "48")
    with pytest.raises(SystemExit):
        run("--logdir", str(tmp_path), "--steps", "96", "--language.held_out", "0.2")
    assert "other prompts than those that the run has learnt from" in capsys.readouterr().err


@pytest.mark.run
def test_weights_of_another_vocabulary_are_refused(tmp_path, prompts, capsys):
    run("--logdir", str(tmp_path / "one"), "--steps", "24")
    with pytest.raises(SystemExit):
        run("--init", str(tmp_path / "one/latest.pt"), "--language.prompts", prompts, "--logdir", str(tmp_path / "two"))
    assert "the weights are of another vocabulary" in capsys.readouterr().err


calls = 0


def fails_late(prompt: str, completion: str, answer: str) -> float:
    global calls
    calls += 1
    return 0.0 if calls < 100 else float("nan")


@pytest.mark.run
def test_what_was_learnt_is_not_lost_by_a_reward_that_fails(tmp_path, capsys):
    options = ("--logdir", str(tmp_path), "--language.reward", "tests.test_texts:fails_late", "--steps", "480")
    with pytest.raises(SystemExit):
        run(*options, "--checkpoint_every", "100000")
    assert "it has to give a number" in capsys.readouterr().err
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["state"]["step"] == 96


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("vocabulary", "and its tokeniser 12"),
        ("missing", "lacks weights"),
        ("cut", "which cannot be loaded"),
        ("nan", "its weights are not finite"),
        ("heads", "which cannot be loaded"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(damage, expected, tmp_path):
    sampler = text_sampler()
    model: Any = sampler.policy
    if damage == "vocabulary":
        model.resize_token_embeddings(7)
    if damage == "nan":
        model.transformer.wte.weight.data[0, 0] = float("nan")
    folder = tmp_path / "model"
    sampler.save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "missing":
        safetensors = pytest.importorskip("safetensors.torch")
        kept = {name: value for name, value in safetensors.load_file(weights).items() if "h.0.mlp" not in name}
        safetensors.save_file(kept, weights, metadata={"format": "pt"})
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    if damage == "heads":
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, "n_head": 0}))
    with pytest.raises(ConfigError, match=expected) as error:
        text_sampler(**{"language.model": folder})
    assert "\n" not in str(error.value)


def test_models_that_complete_nothing_are_refused(tmp_path):
    folder = tmp_path / "model"
    sampler = text_sampler()
    sampler.save_pretrained(folder)
    settings = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=False
    )
    transformers.BertLMHeadModel(settings).save_pretrained(folder)
    with pytest.raises(ConfigError, match="which does not go on with a text token by token"):
        text_sampler(**{"language.model": folder})


def test_a_prompt_without_a_token_is_refused(tmp_path, prompts):
    first = text_sampler()
    first.save_pretrained(tmp_path / "model")
    tokens = json.loads((tmp_path / "model/tokenizer.json").read_text())
    tokens["model"]["unk_token"], tokens["pre_tokenizer"] = "<unknown>", {"type": "WhitespaceSplit"}
    tokens["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ConfigError, match=r"the prompt '.*' has no token in the model's vocabulary"):
        text_sampler(**{"language.model": tmp_path / "model"})
