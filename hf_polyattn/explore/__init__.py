"""`polyattn explore`: a model and its polynomials in the browser.

`session` is what is computed, `answers` what a model says, `script` the lines that do what was done, `page` how it
looks, `command` the server. gradio, of `hf_polyattn[explore]`, is imported by `page` and `command` only.
"""

from .session import Session

__all__ = ["Session"]
