"""Fills a checkpoint's chat template; run by `jaxopd.confined`, which ends one that loops or grows without bound."""

from transformers.utils.chat_template_utils import render_jinja_template


def answer(request: dict) -> dict:
    """Return the text of one conversation, or the reason why there is none."""
    conversation, variables = request["messages"], request["variables"]
    try:
        texts, _ = render_jinja_template(
            conversations=[conversation], chat_template=request["template"], add_generation_prompt=True, **variables
        )
    except Exception as error:  # a template may raise anything
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return {"text": texts[0]}
