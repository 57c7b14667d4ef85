"""TRL's own trainers: DPOTrainer loads exported preferences, and GRPOTrainer trains with the reward function.

TRL is optional; without it these tests are skipped. `pip install '.[trl]'` brings the pinned version.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ledom.inference import TransformersEngine
from megatron_ledom.rewards import ReverseRewardFunction, TrlReward
from megatron_ledom.rewards.preferences import PreferenceSettings, export_preferences

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
COMMON: dict[str, Any] = {
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def loaded(folder: Path) -> tuple[Any, Any]:
    """Return the stock model and tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False), tokenizer


@pytest.mark.parametrize("kind", ["json", "parquet", "conversational"])
def test_dpo_trains_on_exported_preferences(
    kind: str, folders: tuple[Path, Path], made: dict[str, str], tmp_path: Path
) -> None:
    settings = PreferenceSettings(conversational=kind == "conversational")
    counts = export_preferences([made["ranked"]], tmp_path / "pairs", settings)
    reader, ending = ("json", "jsonl") if kind == "json" else ("parquet", "parquet")
    pairs = load_dataset(reader, data_files=str(tmp_path / f"pairs.{ending}"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(pairs) == counts["num_pairs"] == 6
    model, tokenizer = loaded(folders[0])
    arguments = trl.DPOConfig(output_dir=str(tmp_path / "dpo"), per_device_train_batch_size=2, **COMMON)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(math.log(2), abs=1e-3)  # the trained model is still its own reference


@pytest.mark.parametrize("kind", ["plain", "conversational"])
def test_grpo_trains_with_the_reward(
    kind: str, folders: tuple[Path, Path], engines: tuple[TransformersEngine, TransformersEngine], tmp_path: Path
) -> None:
    questions = [f"What is {number} times 7?" for number in range(4)]
    prompts = [[{"role": "user", "content": text}] if kind == "conversational" else f"{text}\n" for text in questions]
    model, tokenizer = loaded(folders[0])
    reward = TrlReward(ReverseRewardFunction(*engines, unscored=-500.0))
    calls: list[dict[str, Any]] = []

    def kept(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rewards = reward(prompts, completions, **columns)
        calls.append({"prompts": prompts, "completions": completions, "rewards": rewards})
        return rewards

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "grpo"), per_device_train_batch_size=4, num_generations=2, max_completion_length=8, **COMMON
    )
    data = Dataset.from_list([{"prompt": prompt, "answer": "7"} for prompt in prompts])
    trainer = trl.GRPOTrainer(
        model, reward_funcs=[reward, kept], args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "rewards/reverse_reward/mean" in entry)
    [call] = calls
    assert len(call["rewards"]) == 4
    assert log["rewards/reverse_reward/mean"] == pytest.approx(sum(call["rewards"]) / 4, rel=1e-4)
    assert log["rewards/kept/mean"] == pytest.approx(log["rewards/reverse_reward/mean"], rel=1e-5)
    texts = [one if isinstance(one, str) else one[0]["content"] for one in call["completions"]]
    asked = [one if isinstance(one, str) else one[0]["content"] + "\n" for one in call["prompts"]]
    assert call["rewards"] == pytest.approx(reward.function(asked, texts), abs=1e-4), json.dumps(texts)
    assert math.isfinite(log["loss"])
