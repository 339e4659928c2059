"""Checks of `sampler`: what a server can sample is fixed."""

from urllib.parse import urlsplit

from preflab.settings.schema import SamplerSettings, Settings
from utils import ConfigError


def check_sampler(settings: Settings, *, n_policies: int, samples: bool) -> None:
    """Raise ConfigError for settings of `sampler` that do not fit the run. n_policies: of
    function=eval. samples: whether evaluations draw samples."""
    check_address(settings.sampler)
    sampler, function = settings.sampler, settings.function
    if sampler.url is None or function not in ("train", "eval", "online"):
        return  # the others sample nothing
    fixed = function == "online" and settings.online.sampler is not None
    if function != "eval" and not fixed and (sampler.model or not sampler.reference_model):
        more = ", or online.sampler=reference for a fixed sampler" if function == "online" else ""
        raise ConfigError(
            f"sampler.url={sampler.url}: the policy of function={function} changes with every step,"
            " and a server holds one that does not; name the reference on it, with"
            f" sampler.reference_model=NAME{more}"
        )
    if function == "eval" and n_policies > 1 and (sampler.model or not sampler.reference_model):
        raise ConfigError(
            f"sampler.url={sampler.url} serves one policy, and model.archive names {n_policies};"
            " evaluate one at a time, or serve the reference alone, with"
            " sampler.reference_model=NAME"
        )
    if not samples and not fixed:
        raise ConfigError(
            f"sampler.url={sampler.url}: this run draws no samples; leave it out, or set"
            " sample_during_eval=true"
        )


def check_policy_only(sampler: SamplerSettings) -> None:
    """Raise ConfigError where a command that samples a policy alone is given a reference."""
    check_address(sampler)
    if sampler.reference_model is not None:
        raise ConfigError(
            f"sampler.reference_model={sampler.reference_model}: this command samples the policy"
            " alone; name it with sampler.model"
        )


def check_address(sampler: SamplerSettings) -> None:
    """Raise ConfigError for an address that is none, and for names without an address."""
    if sampler.url is None:
        for key in ("model", "reference_model"):
            if (value := getattr(sampler, key)) is not None:
                raise ConfigError(
                    f"sampler.{key}={value} names a model of a server, and sampler.url is null;"
                    " give its address, such as sampler.url=http://127.0.0.1:8000/v1"
                )
        return
    try:
        parts = urlsplit(sampler.url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        has_secret = "@" in parts.netloc
    except ValueError:
        is_address = has_secret = False
    if not is_address:
        raise ConfigError(
            f"sampler.url={sampler.url} is not an address; give one such as"
            " http://127.0.0.1:8000/v1"
        )
    if has_secret:
        raise ConfigError(
            "sampler.url holds a user or a password, which would be saved in config.yaml; give a"
            " token in the environment variable of sampler.token_env"
        )
