"""Sampling one round ahead: the responses of a round are drawn while the round before is labelled,
measured and learned from (asynchronous RLHF, Noukhovitch et al., arXiv:2410.18252).

Round n then learns from responses of the policy that round n - 1 began with, and no longer from
those of the policy that it begins with itself: off-policy by one round. The first two rounds have
the responses of the initial policy.
"""

import copy
import threading

import torch

from preflab.batching.examples import PromptToSample
from preflab.distributed.process_group import World
from preflab.distributed.signals import STOP_SIGNALS, Stopped
from preflab.modeling.logprobs import Scorer
from preflab.online.drawing import Drawing, PromptLoader
from preflab.online.rollouts import Rollouts
from utils import PrefLabError

Tokens = list[list[list[int]]]  # of a round, (prompts, K, tokens)

CHECK_SECONDS = 0.2  # between two looks at whether a signal asks the run to stop


class Ahead:
    """Draws the responses of rounds in a thread.

    drawing: draws them, from a model that nothing else uses, in its own world, whose only
    signal is that of `abandon`. follows: the policy whose weights this model gets; None where the
    sampler does not change.
    """

    def __init__(self, drawing: Drawing, follows: Scorer | None):
        self.drawing, self.follows = drawing, follows
        self._drawn: dict[int, Tokens] = {}  # by round
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of the thread

    def begin(self, number: int, prompts: list[PromptToSample]) -> None:
        """Begin to draw the responses of round `number`, from the policy of this moment."""
        if self.follows is not None:
            copy_weights(self.drawing.sampler, self.follows)
        stream = _stream_of(self.drawing.sampler.device)

        def draw() -> None:
            try:
                with torch.cuda.stream(stream):
                    self._drawn[number] = self.drawing.draw(number, prompts)[0]
            except (Stopped, PrefLabError):
                # Abandoned; or the server failed, which is asked again when the round begins.
                self._drawn.pop(number, None)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=draw, name="sample ahead", daemon=True)
        self._thread.start()

    def wait(self, world: World) -> None:
        """Wait until nothing is being drawn. Raises Stopped, and the error of the thread."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(CHECK_SECONDS)
            world.stop_if_asked()
        self._end()

    def keep(self, number: int, tokens: Tokens) -> None:
        """Have the responses of round `number`, which were drawn elsewhere."""
        self._drawn[number] = tokens

    def take(self, number: int) -> Tokens | None:
        """The responses of round `number`; None where they have not been drawn."""
        self._drawn = {n: tokens for n, tokens in self._drawn.items() if n >= number}
        return self._drawn.get(number)

    def abandon(self) -> None:
        """End what is being drawn, if anything is."""
        if self._thread is not None:
            self.drawing.world.stop.received = STOP_SIGNALS[0]
            self._thread.join()
            self._thread = self._error = self.drawing.world.stop.received = None

    def _end(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def state(self, number: int) -> Tokens | None:
        """What a checkpoint needs before round `number`, whose responses may be being drawn."""
        if number not in self._drawn:
            self._end()
        return self._drawn.get(number)

    def load(self, number: int, tokens: Tokens | None) -> None:
        """Return to what `state` returned."""
        self.abandon()
        self._drawn = {} if tokens is None else {number: tokens}


class RolloutSource:
    """The rollouts of each round, drawn when the round begins, or by `ahead` a round before."""

    def __init__(self, prompts: PromptLoader, drawing: Drawing, ahead: Ahead | None):
        self.prompts, self.drawing, self.ahead = prompts, drawing, ahead

    def initial(self, n: int, recorded: list[dict]) -> Rollouts:
        """Rollouts of `n` prompts before the first round. recorded: as in `Drawing.roll_out`."""
        prompts: list[PromptToSample] = []
        while len(prompts) < n:
            prompts += next(self.prompts)
        return self.drawing.roll_out(0, prompts[:n], recorded)

    def of_round(self, number: int, room: int | None, recorded: list[dict]) -> Rollouts:
        """The rollouts of round `number`. room: its largest number of prompts. recorded: as in
        `Drawing.roll_out`. Those of the next round begin to be drawn, if that is ahead."""
        prompts, drawn = next(self.prompts), None
        if self.ahead is not None:
            drawn = self.ahead.take(number) or self.drawing.draw(number, prompts)[0]
            self.ahead.keep(number, drawn)
            self.ahead.begin(number + 1, self.prompts.peek())
        return self.drawing.roll_out(number, prompts[:room], recorded, drawn)

    def wait(self, world: World) -> None:
        """Wait until nothing is being drawn. Raises Stopped."""
        if self.ahead is not None:
            self.ahead.wait(world)

    def abandon(self) -> None:
        """End what is being drawn, if anything is."""
        if self.ahead is not None:
            self.ahead.abandon()

    def state_dict(self, number: int) -> dict:
        """The state before round `number`, for a checkpoint."""
        ahead = {} if self.ahead is None else {"ahead": self.ahead.state(number)}
        return {"loader": self.prompts.state_dict(), **ahead}

    def load_state_dict(self, state: dict, number: int) -> None:
        """Return to what `state_dict` returned before round `number`."""
        self.prompts.load_state_dict(state["loader"])
        if self.ahead is not None:
            self.ahead.load(number, state["ahead"])


def twin_of(scorer: Scorer) -> Scorer:
    """The same model in modules of its own. It shares the weights that are not trained."""
    frozen = {id(p): p for p in scorer.model.parameters() if not p.requires_grad}
    twin = copy.copy(scorer)
    twin.model = copy.deepcopy(scorer.model, frozen).requires_grad_(False)
    twin.enter = lambda function: function()
    return twin


@torch.no_grad()
def copy_weights(twin: Scorer, source: Scorer) -> None:
    """Give a twin the weights that its source has now."""
    for own, theirs in zip(twin.model.parameters(), source.model.parameters(), strict=True):
        if own is not theirs:
            own.copy_(theirs)


def _stream_of(device: torch.device) -> "torch.cuda.Stream | None":
    """A stream beside that of training, which begins after what is queued there; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
