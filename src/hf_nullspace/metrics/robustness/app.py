"""The metric's Space: `python app.py` (needs gradio)."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("robustness"))
