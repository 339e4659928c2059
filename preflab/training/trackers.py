"""Logging to Weights & Biases, which never prompts, hangs or fails a run."""

import logging
import netrc
import os
from pathlib import Path

from preflab.settings.schema import WandbSettings

logger = logging.getLogger(__name__)


def start_wandb(settings: WandbSettings, run_dir: Path, resolved: dict):
    """A wandb run, or None where it is off or does not start.

    settings: enabled, entity and project. resolved: the config to show there. Without a configured
    key the run is offline, in the run folder; `wandb sync` uploads it later.
    """
    if not settings.enabled:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    try:
        import wandb  # slow to import

        return wandb.init(
            entity=settings.entity,
            project=settings.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=resolved,
            resume="allow",
            settings=wandb.Settings(init_timeout=30, console="off", x_disable_stats=True),
        )
    except Exception as error:  # of any class: the run has its metrics.jsonl in any case
        logger.warning(f"wandb did not start, the run continues without it: {error}")
        return None


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
