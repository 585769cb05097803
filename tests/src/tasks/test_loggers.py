"""Lightning's loggers: what they log, and errors before the work or after the results."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from pytorch_lightning.loggers import CSVLogger

from scatterbrain.errors import UserError
from src.distributed.loggers import build_loggers
from src.evaluation.results import read_results
from src.tasks.classification_evaluation import SeededClassifier
from src.tasks.evaluate import evaluate
from src.tasks.train import train
from tests.src.tasks.setup import compose_config

TWO = {"eval__attentions": "[full,local]"}


class WandbRun:
    """A run of the stand-in for wandb."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.logged = module, []

    def log(self, metrics) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        self.module.run = None


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb without a login: `runs` are those that began, and `run` is the one that is in progress."""
    module = ModuleType("wandb")
    module.run, module.runs = None, []

    def init(**options):
        module.run = WandbRun(module)
        module.runs.append(module.run)
        return module.run

    def login():
        raise RuntimeError("No API key configured.\nSee the documentation of wandb.")

    module.init, module.login = init, login
    lib, wandb_run = ModuleType("wandb.sdk.lib"), ModuleType("wandb.wandb_run")
    lib.RunDisabled, wandb_run.Run = type("RunDisabled", (), {}), WandbRun
    for other in (module, ModuleType("wandb.sdk"), lib, wandb_run):
        monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.setenv("WANDB_MODE", "online")  # put back afterwards: the logger sets it
    return module


def test_wandb_without_a_login_names_the_option(evaluation, wandb, monkeypatch):
    monkeypatch.setattr(SeededClassifier, "step", lambda *_: pytest.fail("it has been evaluated before"))
    with pytest.raises(UserError) as caught:
        evaluate(evaluation(logger="wandb"))
    message = str(caught.value)
    assert message.startswith("logger.wandb cannot log in (No API key configured). ")
    assert "wandb login" in message
    assert "logger.wandb.offline=true" in message
    assert "\n" not in message


def test_wandb_without_a_login_in_a_training(training, wandb):
    with pytest.raises(UserError, match=r"logger\.wandb\.offline=true"):
        train(training(logger="wandb"))


@pytest.mark.parametrize("how", ["option", "offline", "disabled"])
def test_wandb_offline_needs_no_login(wandb, tmp_path, monkeypatch, how):
    if how != "option":
        monkeypatch.setenv("WANDB_MODE", how)
    options = ["logger=wandb", f"logger.wandb.offline={'true' if how == 'option' else 'false'}"]
    assert len(build_loggers(compose_config(options, tmp_path).logger)) == 1


def test_each_attention_has_a_run_of_wandb(evaluation, wandb):
    results, _ = evaluate(evaluation("t2t_vit_t_14", logger="wandb", logger__wandb__offline="true", **TWO))
    assert wandb.run is None
    assert [[entry["test/loss"] for entry in run.logged] for run in wandb.runs] == [[each.loss] for each in results]


def test_a_training_ends_its_run_of_wandb(training, wandb):
    train(training(logger="wandb", logger__wandb__offline="true", train__epochs=2))
    assert wandb.run is None
    (run,) = wandb.runs
    assert any("val/top1" in entry for entry in run.logged)


def test_a_logger_that_fails_costs_no_results(evaluation, tmp_path, monkeypatch):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no answer from the server\nand more")

    monkeypatch.setattr(CSVLogger, "log_metrics", log_metrics)
    with pytest.raises(UserError) as caught:
        evaluate(evaluation("t2t_vit_t_14", logger="csv", **TWO))
    assert str(caught.value).count("CSVLogger failed: no answer from the server. Check its options") == 2
    assert "logger=csv" in str(caught.value)
    for number in "01":
        assert read_results(tmp_path / "run" / number).complete
        assert (tmp_path / "run" / number / "predictions.csv").is_file()
    assert (tmp_path / "run" / "comparison.json").is_file()


def test_a_logger_that_cannot_start_costs_no_training(training, monkeypatch):
    monkeypatch.setattr(CSVLogger, "experiment", property(lambda self: 1 / 0))
    with pytest.raises(UserError, match="CSVLogger failed: division by zero"):
        train(training(logger="csv"))


def test_the_default_of_mlflow_is_a_database(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = compose_config(["logger=mlflow", "paths.log_dir=my/logs"], tmp_path)
    assert config.logger.mlflow.tracking_uri == "sqlite:///my/logs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert compose_config(["logger=mlflow"], tmp_path).logger.mlflow.tracking_uri == "https://mlflow.example"


# The packages themselves, where they are installed.


def test_mlflow_has_the_metrics(evaluation, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (loggers are optional)")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    results, _ = evaluate(evaluation(logger="mlflow", paths__log_dir=tmp_path / "logs"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (experiment,) = (each for each in client.search_experiments() if each.name == "scatterbrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/top1"] == pytest.approx(results.top1)


@pytest.fixture
def real_wandb(monkeypatch, tmp_path):
    """The package, as on a machine where nobody has logged in."""
    package = pytest.importorskip("wandb", reason="wandb is not installed (loggers are optional)")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    package.teardown()  # it reads the environment once per process
    yield
    package.teardown()


def test_wandb_itself_without_a_login(evaluation, real_wandb):
    with pytest.raises(UserError, match=r"logger\.wandb\.offline=true"):
        evaluate(evaluation(logger="wandb"))


def test_wandb_itself_offline(evaluation, tmp_path, real_wandb):
    evaluate(evaluation("t2t_vit_t_14", logger="wandb", logger__wandb__offline="true", **TWO))
    for number in "01":
        assert len(list((tmp_path / "run" / number / "wandb").glob("offline-run-*"))) == 1
