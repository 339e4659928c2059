"""Entry point: a service that scores responses and, with a discriminator, buys labels and learns
from them as D2PO does.

    python serve_reward.py reward=bagofwords online.discriminator=bradley_terry
    online.discriminator_path=RM port=5007 local_run_dir=STATE python train.py function=online
    reward=http reward.url=http://127.0.0.1:5007

POST /predict scores, POST /train scores, labels and learns (rewards.py says what both are sent and
answer), GET /health and GET /state tell how it is. Requests are worked on one after the other.
Everything it has bought, learnt and answered is in STATE: started again with the same command it
goes on. It listens to this machine alone unless `host` says otherwise, and asks for a bearer token
where the environment variable REWARD_TOKEN is set.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from preflab.settings.command_line import check_command_line
from preflab.settings.overrides import fail
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError, PrefLabError, atomic_write, in_use


def main() -> None:
    check_command_line(sys.argv[1:], "serve_reward.py")
    sys.argv.insert(1, "function=online")
    register_resolvers()
    run()


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run(config: DictConfig) -> None:
    # These import torch, and a mistake on the command line is answered before.
    import uvicorn

    import losses  # noqa: F401  registers the losses
    import preference_datasets  # noqa: F401  registers the datasets
    from preflab.checks import check_service
    from preflab.distributed.console import configure_logging
    from preflab.online.service import Service, make_app
    from preflab.settings.load import validate
    from trainers import BasicTrainer

    configure_logging()
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        settings = validate(config)
        check_service(settings)
        if (before := folder / "config.yaml").is_file():
            _same_service(OmegaConf.load(before), config, folder)
        with in_use(folder / "labels.lock"):
            service = Service(settings, folder, BasicTrainer)
            with atomic_write(folder / "config.yaml") as f:
                f.write(OmegaConf.to_yaml(config, resolve=True))
            print(
                f"{settings.reward['name']} at http://{settings.host}:{settings.port}, state in"
                f" {folder}",
                flush=True,
            )
            uvicorn.run(
                make_app(service, os.environ.get("REWARD_TOKEN")),
                host=settings.host,
                port=settings.port,
                log_level="warning",
            )
    except PrefLabError as error:
        fail(error)


def _same_service(before: DictConfig, config: DictConfig, folder: Path) -> None:
    """A ledger and a discriminator go on under the gold and the settings they came from."""
    for key in ("reward", "online.discriminator", "online.discriminator_path"):
        was, now = (
            OmegaConf.to_container(
                OmegaConf.create({"value": OmegaConf.select(c, key)}), resolve=True
            )["value"]
            for c in (before, config)
        )
        if was != now:
            raise ConfigError(
                f"{key} was {was} and is now {now}: {folder} holds the state of another service;"
                " take another local_run_dir"
            )


if __name__ == "__main__":
    main()
