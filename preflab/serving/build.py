"""The models of a run that a server samples."""

from pathlib import Path

from preflab.serving.sampler import STORE, ServedModel, weights_stamp
from preflab.settings.schema import Settings


def served_models(
    settings: Settings, folder: Path, archive: str | None = None
) -> dict[str, ServedModel]:
    """What a server samples in a run, by "policy" (of function=eval), "sampler" (of online rounds)
    and "reference" (of evaluations). folder: where their responses are kept. archive: the policy's
    of function=eval."""
    return {
        of: ServedModel(
            settings.sampler,
            name=settings.sampler.reference_model if of == "reference" else settings.sampler.model,
            of=of,
            stamp=weights_stamp(settings.model, source),
            store=folder / STORE,
        )
        for of, source in _served(settings, archive).items()
    }


def served_columns(settings: Settings) -> dict[str, str]:
    """What the rows of samples say of the server: nothing where there is none."""
    if settings.sampler.url is None:
        return {}
    return {"sampled_by": f"{settings.sampler.server}: {', '.join(_served(settings))}"}


def _served(settings: Settings, archive: str | None = None) -> dict[str, str | None]:
    """The archive of each model that a server samples; None for the model of `name_or_path`."""
    sampler, model = settings.sampler, settings.model
    if sampler.url is None:
        return {}
    is_eval = settings.function == "eval"
    start = None if is_eval else model.archive  # the reference of training is where it starts
    reference = model.reference_archive or start
    served = {"reference": reference} if sampler.reference_model else {}
    if is_eval and (sampler.model or not sampler.reference_model):
        served["policy"] = archive
    if settings.function == "online" and settings.online.sampler is not None:
        source = settings.online.sampler
        served["sampler"] = reference if source == "reference" else source
    return served
