"""Entry point: an HTTP service that scores responses and, with a discriminator, buys labels and
learns from them as in D2PO.

    python serve_reward.py reward=bagofwords online.discriminator=bradley_terry \\
        online.discriminator_path=RM port=5007 local_run_dir=STATE
    python train.py function=online reward=http reward.url=http://127.0.0.1:5007

POST /predict scores; POST /train scores, labels and learns; GET /health and GET /state describe the
service. preflab/online/service.py has the bodies of the requests, which are handled one after the
other. STATE holds everything that was bought, learned and answered, and the same command continues
from it. The service is reachable only from this machine unless `host` is set, and requires a bearer
token if the environment variable REWARD_TOKEN is set.
"""

import contextlib
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from preflab.settings.command_line import check_command_line, large_imports, run_config
from preflab.settings.refused import errors_in_one_line
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError, atomic_write, in_use, remove_leftovers


def main() -> None:
    """Check the command line, and serve until a signal."""
    check_command_line(sys.argv[1:], "serve_reward.py")
    sys.argv.insert(1, "function=online")
    register_resolvers()
    run_config(run)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run(config: DictConfig) -> None:
    """Serve a composed config."""
    # These import torch, and a mistake on the command line is answered before.
    with large_imports():
        import losses  # noqa: F401  registers the losses
        import preference_datasets  # noqa: F401  registers the datasets
        from preflab.checks import check_service
        from preflab.distributed.console import configure_logging
        from preflab.online.connections import make_server
        from preflab.online.service import Service, make_app
        from preflab.reports.run_files import read_config
        from preflab.settings.load import validate
        from trainers import BasicTrainer

    configure_logging()
    folder = Path(HydraConfig.get().runtime.output_dir)
    with errors_in_one_line():
        settings = validate(config)
        check_service(settings)
        if (before := folder / "config.yaml").is_file():
            _same_service(read_config(before), config, folder)
        with in_use(folder / "labels.lock", ", which buys labels for it"):
            remove_leftovers(folder)
            service = Service(settings, folder, BasicTrainer)
            with atomic_write(folder / "config.yaml") as f:
                f.write(OmegaConf.to_yaml(config, resolve=True))
            print(
                f"{settings.reward['name']} at http://{settings.host}:{settings.port}, state in"
                f" {folder}",
                flush=True,
            )
            app = make_app(service, os.environ.get("REWARD_TOKEN"))
            with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, after the last answer
                make_server(app, settings.host, settings.port).run()


def _same_service(before: DictConfig, config: DictConfig, folder: Path) -> None:
    """Raise ConfigError if the state in the folder belongs to another reward or discriminator."""
    for key in ("reward", "online.discriminator", "online.discriminator_path"):
        was, now = _plain_value(before, key), _plain_value(config, key)
        if was != now:
            raise ConfigError(
                f"{key} was {was} and is now {now}: {folder} holds the state of another service;"
                " take another local_run_dir"
            )


def _plain_value(config: DictConfig, key: str):
    """A setting as plain Python values, with its interpolations resolved."""
    value = OmegaConf.create({"value": OmegaConf.select(config, key)})
    return OmegaConf.to_container(value, resolve=True)["value"]


if __name__ == "__main__":
    main()
