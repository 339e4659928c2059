"""The mirror of metrics.jsonl at wandb, which never prompts, hangs or fails a run."""

import netrc
import os
import sys
from pathlib import Path


def start_wandb(config, run_dir: Path, resolved: dict):
    """A wandb run, or None when it is off or does not start: logging elsewhere never stops a run,
    nor asks anything.

    Without a configured key it runs offline, into the run folder; `wandb sync` uploads it later.
    """
    if not config.enabled:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
    try:
        import wandb  # slow to import

        return wandb.init(
            entity=config.entity,
            project=config.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=resolved,
            resume="allow",
            settings=wandb.Settings(init_timeout=30, console="off", x_disable_stats=True),
        )
    except Exception as error:  # whatever goes wrong there, the run and its metrics.jsonl go on
        print(f"wandb did not start, the run goes on without it: {error}", file=sys.stderr)
        return None


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
