"""Every choice of every group composes, and is what its name says."""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from scatterbrain.attention import ATTENTIONS, attention_memory
from scatterbrain.errors import UserError
from src.distributed.trainer import build_trainer
from src.models.t2t_vit import T2T_VIT_VARIANTS
from src.tasks.attention_info import attention_name
from src.tasks.build import build_model
from src.utils.instantiate import build, build_group
from tests.src.tasks.setup import (
    CONFIG_DIR,
    EXPERIMENT,
    SEQUENCE_EXPERIMENTS,
    TRAINING_EXPERIMENT,
    compose_config,
)

TRANSFORMER_VARIANTS = [name for name, variant in T2T_VIT_VARIANTS.items() if variant.tokens == "transformer"]
LOGGERS = {
    **{"csv": "CSVLogger", "tensorboard": "TensorBoardLogger"},
    **{"mlflow": "MLFlowLogger", "wandb": "WandbLogger"},
}


def names(group: str) -> set[str]:
    return {path.stem for path in Path(CONFIG_DIR, group).glob("*.yaml")}


def experiment(*arguments: str):
    return compose_config([f"experiment={EXPERIMENT}", *arguments])


def test_the_files_are_those_of_the_tables():
    assert names("model/t2tmodel") == set(T2T_VIT_VARIANTS)
    assert names("model/t2tattn_cfg") == set(ATTENTIONS)


@pytest.fixture(autouse=True)
def shallow_models(monkeypatch):
    """One backbone block in place of up to 24: what is built here is looked at, not run."""
    for name, variant in T2T_VIT_VARIANTS.items():
        monkeypatch.setitem(T2T_VIT_VARIANTS, name, dataclasses.replace(variant, depth=1))


@pytest.mark.parametrize("variant", sorted(T2T_VIT_VARIANTS))
def test_every_variant(variant):
    config = experiment(f"model/t2tmodel={variant}").model
    assert config.name == variant
    model = build_model(config)
    assert tuple(model.head.weight.shape) == (1000, T2T_VIT_VARIANTS[variant].embed_dim)
    assert (model.token_attentions is None) == (variant not in TRANSFORMER_VARIANTS)


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_every_attention(variant, attention):
    config = experiment(f"model/t2tmodel={variant}", f"model/t2tattn_cfg={attention}").model
    model = build_model(config)
    assert [type(module) for module in model.token_attentions] == 2 * [ATTENTIONS[attention].module]
    assert attention_name(config, model) == attention


@pytest.mark.parametrize("variant", sorted(set(T2T_VIT_VARIANTS) - set(TRANSFORMER_VARIANTS)))
def test_performer_tokens_take_no_attention(variant):
    with pytest.raises(UserError, match=rf"{variant} takes no attention.*model/t2tmodel=t2t_vit_t_14"):
        build_model(experiment(f"model/t2tmodel={variant}", "model/t2tattn_cfg=full").model)


def test_published_budgets_are_the_defaults():
    first, second = build_model(experiment("model/t2tattn_cfg=sblocal").model).token_attentions
    assert (first.sizes()["local_context"], first.sizes()["nb_features"]) == (49, 24)
    assert (second.sizes()["local_context"], second.sizes()["nb_features"]) == (12, 6)


@pytest.mark.parametrize(
    ("attention", "override", "size", "expected"),
    [
        ("local", "model.t2tattn1_cfg.local_context=64", "local_context", [64, 24]),
        ("sblocal", "model.t2tattn2_cfg.local_context=5", "local_context", [49, 5]),
        ("sblocal", "model.t2tattn1_cfg.nb_features=10", "nb_features", [10, 6]),
        ("performer", "model.t2tattn2_cfg.nb_features=3", "nb_features", [49, 3]),
        ("performer", "model.t2tattn1_cfg.memory_fraction=0.0625", "nb_features", [98, 24]),
        ("local", "model.t2tattn2_cfg.memory_fraction=0.0625", "local_context", [98, 49]),
    ],
)
def test_an_override_changes_the_module(attention, override, size, expected):
    model = build_model(experiment(f"model/t2tattn_cfg={attention}", override).model)
    assert [module.sizes()[size] for module in model.token_attentions] == expected


def test_two_attentions_in_one_model():
    config = experiment("model/t2tattn_cfg=local", "model.t2tattn2_cfg={name: full}").model
    assert attention_name(config, build_model(config)) == "local+full"


def test_one_attention_alone_is_refused():
    config = experiment("model.t2tattn1_cfg={name: local}").model
    with pytest.raises(UserError, match="Only one of"):
        build_model(config)


def test_without_attention_it_is_full():
    config = experiment().model
    assert attention_name(config, build_model(config)) == "full"


def test_the_seed_reaches_the_random_features():
    rows = [
        build_model(experiment("model/t2tattn_cfg=performer", f"seed={seed}").model).token_attentions[0]
        for seed in (1, 1, 2)
    ]
    first, same, other = (module.projection_matrix for module in rows)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_experiment_is_the_published_evaluation():
    config = experiment()
    assert (config.mode, config.seed, config.name) == ("eval", 1111, EXPERIMENT)
    module = config.datamodule
    assert (module.test_split, module.image_size, module.crop_pct, module.interpolation, module.batch_size) == (
        "val",
        224,
        0.9,
        "bicubic",
        128,
    )


def test_the_experiment_is_the_published_training():
    config = compose_config([f"experiment={TRAINING_EXPERIMENT}"])
    assert (config.mode, config.name, config.model.name) == ("train", TRAINING_EXPERIMENT, "t2t_vit_t_14")
    assert (config.model.drop_path_rate, config.model.image_size, config.model.num_classes) == (0.1, 224, 1000)
    optimizer, scheduler, options = config.optimizer, config.scheduler, config.train
    assert (optimizer.opt, optimizer.lr, optimizer.weight_decay, options.lr_batch) == ("adamw", 5e-4, 0.05, 512)
    assert 8 * config.datamodule.batch_size == options.lr_batch  # on eight devices
    assert (scheduler.sched, scheduler.warmup_epochs, scheduler.warmup_lr) == ("cosine", 10, 1e-6)
    assert (scheduler.cooldown_epochs, scheduler.min_lr, scheduler.step_on_epochs) == (10, 1e-5, True)
    assert (options.epochs, config.trainer.max_epochs) == (310, 310)
    assert options.ema_decay == config.callbacks.ema.multi_avg_fn.decay == 0.99996
    augmentation = config.datamodule.augmentation
    assert (augmentation.mixup_alpha, augmentation.cutmix_alpha, augmentation.mixup_prob) == (0.8, 1.0, 1.0)
    assert (augmentation.mixup_switch_prob, augmentation.label_smoothing) == (0.5, 0.1)
    assert (augmentation.auto_augment, augmentation.interpolation) == ("rand-m9-mstd0.5-inc1", "random")
    assert (augmentation.re_prob, augmentation.re_mode, augmentation.hflip) == (0.25, "pixel", 0.5)
    assert list(augmentation.scale) == [0.08, 1.0]
    assert (options.ckpt, options.resume, options.redraw_steps) == (None, False, None)


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_the_training_takes_every_attention(attention):
    config = compose_config([f"experiment={TRAINING_EXPERIMENT}", f"model/t2tattn_cfg={attention}"]).model
    assert attention_name(config, build_model(config)) == attention


@pytest.mark.parametrize("name", sorted(names("experiment") - set(SEQUENCE_EXPERIMENTS)))
def test_every_experiment(name, tmp_path):
    config = compose_config([f"experiment={name}", "trainer.accelerator=cpu"], tmp_path)
    OmegaConf.to_container(config, resolve=True)
    assert config.name == name
    assert config.mode == ("eval" if name.endswith("eval") else "train")
    assert {config.mode} == {mode for mode in ("eval", "train") if mode in config}
    model = build_model(config.model)
    datamodule = build(config.datamodule, "datamodule")
    assert (datamodule.num_classes, datamodule.image_size) == (model.num_classes, model.image_size)
    trainer = build_trainer(config)
    assert trainer.precision == config.trainer.precision
    if config.mode == "train":
        assert trainer.max_epochs == config.train.epochs
        assert config.scheduler.warmup_epochs + config.scheduler.cooldown_epochs < config.train.epochs


@pytest.mark.parametrize("name", SEQUENCE_EXPERIMENTS)
def test_every_experiment_on_sequences(name, tmp_path):
    config = compose_config([f"experiment={name}", "trainer.accelerator=cpu", "model.depth=1"], tmp_path)
    OmegaConf.to_container(config, resolve=True)
    assert (config.name, config.mode) == (name, "sequence")
    assert {"train"} == {mode for mode in ("eval", "train") if mode in config}
    model, datamodule = build(config.model, "model"), build(config.datamodule, "datamodule")
    assert model.head.out_features == datamodule.num_classes
    assert model.embedding.num_embeddings == datamodule.vocabulary
    assert model.length == datamodule.length
    assert (model.pool == "none") == datamodule.causal
    assert (datamodule.steps, datamodule.eval_steps) == (config.train.steps, config.train.eval_steps)
    schedule = build(config.scheduler, "scheduler", steps=config.train.steps)
    assert max(map(schedule, range(1, config.train.steps, 10))) > 0.9


@pytest.mark.parametrize("attention", sorted(names("model/attention")))
def test_every_attention_on_sequences(attention):
    options = ["experiment=lra-listops", f"model/attention={attention}", "model.depth=1", "model.memory_fraction=0.125"]
    config = compose_config(options).model
    (block,) = build(config, "model").blocks
    assert type(block.attention) is ATTENTIONS[attention].module
    if attention != "full":
        assert 0.1 < attention_memory(block.attention, config.length) < 0.26


@pytest.mark.parametrize("name", ["imagenet-t2tvit-finetune", "flowers-t2tvit-train", "flowers-t2tvit-finetune"])
def test_the_checkpoint_to_fine_tune_may_come_from_the_environment(name, monkeypatch):
    monkeypatch.setenv("CHECKPOINT", "/from/CHECKPOINT")
    assert compose_config([f"experiment={name}"]).train.ckpt == "/from/CHECKPOINT"


def test_checkpoints_named_in_configs_exist():
    root = Path(CONFIG_DIR).parent
    named = {
        name
        for path in Path(CONFIG_DIR).rglob("*.yaml")
        for name in re.findall(r"checkpoints/demo/\S+", path.read_text())
    }
    assert named
    assert all((root / name).is_file() for name in named)


def test_datamodule_follows_the_model(tmp_path):
    config = experiment("model.image_size=64", "model.num_classes=3", f"datamodule.data_dir={tmp_path}")
    datamodule = build(config.datamodule, "datamodule")
    assert (datamodule.num_classes, config.datamodule.image_size) == (3, 64)


@pytest.mark.parametrize("logger", sorted(names("logger")))
def test_every_logger(logger, tmp_path, monkeypatch):
    config = compose_config([f"logger={logger}", f"paths.log_dir={tmp_path}"], tmp_path)
    if logger == "none":
        assert build_group(config.logger, "logger") == []
    elif logger == "csv" or find_spec(logger) is not None:
        (built,) = build_group(config.logger, "logger")
        assert type(built).__name__ == LOGGERS[logger]
    else:
        with pytest.raises(UserError, match=f"^logger.{logger} needs .*`?pip install`?.*Or choose another.$"):
            build_group(config.logger, "logger")


@pytest.mark.parametrize("callbacks", sorted(names("callbacks")))
def test_every_group_of_callbacks(callbacks, tmp_path):
    mode = "train" if callbacks == "train" else "eval"  # which it takes its options from
    config = compose_config([f"mode={mode}", f"callbacks={callbacks}"], tmp_path)
    assert len(build_group(config.callbacks, "callbacks")) == len(config.callbacks)


def test_trainer():
    trainer = build(compose_config(["trainer.accelerator=cpu"]).trainer, "trainer", logger=False)
    assert trainer.num_devices == 1


def test_paths_come_from_the_environment(monkeypatch):
    for name in ("DATA_DIR", "CHECKPOINT", "LOG_DIR"):
        monkeypatch.setenv(name, f"/from/{name}")
    config = experiment()
    assert config.datamodule.data_dir == "/from/DATA_DIR"
    assert config.eval.ckpt == "/from/CHECKPOINT"
    assert config.paths.log_dir == "/from/LOG_DIR"
    for name in ("DATA_DIR", "CHECKPOINT", "LOG_DIR"):
        monkeypatch.delenv(name)
    config = experiment()
    assert (config.datamodule.data_dir, config.eval.ckpt, config.paths.log_dir) == (None, None, "logs")


@pytest.mark.parametrize("override", ["datamodule.batchsize=4", "trainer.foo=1", "evl.ckpt=x"])
def test_an_unknown_option_is_refused(override):
    with pytest.raises(ConfigCompositionException):
        experiment(override)


@pytest.mark.parametrize("options", [{"foo": 1}, {"drop_rate": -1}])
def test_what_the_model_refuses_names_the_group(options):
    config = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(experiment().model)), options)
    config.seed = 0
    with pytest.raises(UserError, match="Check the options under 'model'"):
        build_model(config)
