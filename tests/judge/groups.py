"""A judge whose server lives in virtual time, and groups for it."""

from megatron_fapo.algorithm.settings import AlgorithmSettings
from megatron_fapo.judge.answerer import Served
from megatron_fapo.judge.ask import Asker
from megatron_fapo.judge.judge import Judge, Rules
from megatron_fapo.judge.settings import JudgeSettings
from megatron_fapo.records import Outcome, Prompt, Verdict, ints
from tests.builders import make_rollout
from tests.virtual_time import LoopClock, ModelledServer, Words, run_virtual

PROMPT = Prompt(id="p0", task="clock", question="q", messages=(), token_ids=ints([1]), reference_answer="3")
CLEAN = r"all good, \boxed{-1}"
SECOND_IS_WRONG = r"look at 1: \boxed{1}"


def rules(judge: JudgeSettings, algorithm: AlgorithmSettings | None = None, size: int = 8) -> Rules:
    return Rules(judge=judge, algorithm=algorithm or AlgorithmSettings(), group_size=size, max_tokens=100)


def judge_group(solutions, *, server=None, answers=None, settings=None, algorithm=None, gap=1.0):
    """Feed (text or None for a wrong answer) one each `gap` seconds; returns verdicts by rollout number, server."""
    settings = settings or JudgeSettings(probe_share=0.0)
    server = server or ModelledServer(lambda request, index: ((answers or {}).get(_solution(request), CLEAN), 5.0))

    async def work():
        asker = Asker(Served(server, Words()), settings, LoopClock(), seed=1)
        whole = Judge(asker, rules(settings, algorithm, len(solutions)), LoopClock())
        judge = whole.open(0, PROMPT, whole.step(1))
        for number, text in enumerate(solutions):
            await LoopClock().sleep(gap)
            judge.add(make_rollout(f"r{number}", "p0", text or "nonsense"), outcome(text is not None))
        results = await judge.verdicts()
        return [results[f"r{number}"] for number in range(len(solutions))]

    return run_virtual(work()), server


def _solution(request) -> str:
    text = Words().decode(request.token_ids)
    return text.split("<paragraph_0>\n")[1].split("\n")[0]


def outcome(right: bool) -> Outcome:
    return Outcome(right=right, score=1.0 if right else -1.0, answer="", why="")


def reasons(verdicts) -> list[str]:
    return ["verdict" if isinstance(v, Verdict) else v.reason for v in verdicts]


def asked(server) -> list[tuple[float, str]]:
    return [(when, name) for when, what, name in server.log if what == "asked"]
