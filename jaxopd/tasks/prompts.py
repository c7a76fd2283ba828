"""The text templates under tasks/templates, in Jinja; edit those files to change the wording."""

from pathlib import Path
from typing import Any

import jinja2

from jaxopd.errors import InputError

FOLDER = Path(__file__).parent / "templates"
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    undefined=jinja2.StrictUndefined,
    autoescape=False,  # prompts are plain text, not HTML
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill templates/TEMPLATE.jinja; the values themselves are never read as templates.

    Raises:
        InputError: the (edited) template is malformed or names an unknown value.
    """
    file = f"{template}.jinja"
    try:
        return ENVIRONMENT.get_template(file).render(**values)
    except Exception as error:  # an edited template may also divide by zero, or be no UTF-8
        line = getattr(error, "lineno", None)
        where = f"{FOLDER / file}: line {line}" if line else f"{FOLDER / file}"
        raise InputError(f"{where}: found a template that cannot be filled ({error})") from None
