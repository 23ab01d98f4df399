"""The `needle` tasks of lm-eval ask what `conversion.recall` asks."""

import pytest

from modeling_rebased.conversion.recall import FILLER, KINDS, NAMES, item_text
from modeling_rebased.eval.tasks import tasks_path


pytest.importorskip("lm_eval")


@pytest.mark.parametrize("chat", [False, True])
def test_needles(chat):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    asked = []

    class Names(LM):
        """Recalls names and no numbers."""

        tokenizer_name = "none"

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return "".join(f"<{each['role']}>{each['content']}" for each in chat_history) + (
                "<assistant>" if add_generation_prompt else ""
            )

        def chat_template(self, *args, **kwargs):
            return "a template"

        def loglikelihood(self, requests):
            asked.extend(request.args for request in requests)
            return [(-1.0, request.args[1].strip() in NAMES) for request in requests]

        loglikelihood_rolling = generate_until = None

    metadata = {"num_examples": 3, "seed": 2}
    manager = TaskManager(include_path=str(tasks_path()), include_defaults=False, metadata=metadata)
    options = {"apply_chat_template": chat, "bootstrap_iters": 0, "task_manager": manager}
    found = simple_evaluate(model=Names(), tasks=["needle_200", "needle_1000"], **options)["results"]
    assert [found[f"needle_{n}"]["acc,none"] for n in (200, 1000)] == [0.5, 0.5]
    wanted = []
    for lines in (8, 40):
        for kind in KINDS:
            for seed in (6, 7, 8):
                request, beginning, value = item_text(kind, lines, seed)
                assert request.count(FILLER) == lines and request.count(value) == 1
                wanted.append(
                    (f"<user>{request}<assistant>{beginning}" if chat else f"{request} {beginning}", f" {value}")
                )
    assert asked == wanted
