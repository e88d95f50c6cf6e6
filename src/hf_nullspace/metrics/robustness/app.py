"""The metric's Space: `python app.py` (needs gradio). A table of predictions goes in, the scores come out."""

from pathlib import Path
from typing import Any

import evaluate
import gradio as gr

HERE = Path(__file__).parent
COLUMNS = {"predictions": int, "references": int, "condition": str}
EXAMPLE = [[0, 0, "clean"], [1, 1, "clean"], [1, 1, "fog/1"], [0, 1, "fog/1"]]

module = evaluate.load(str(HERE / "robustness.py"))


def compute(rows: list[list[Any]]) -> dict[str, Any]:
    filled = [row for row in rows if all(str(cell).strip() for cell in row)]
    if not filled:
        raise gr.Error("Fill in at least one row: the predicted class, the label, the condition.")
    columns = zip(COLUMNS.items(), zip(*filled, strict=True), strict=True)
    return module.compute(**{name: [kind(cell) for cell in column] for (name, kind), column in columns})


app = gr.Interface(
    fn=compute,
    inputs=gr.Dataframe(EXAMPLE, headers=list(COLUMNS), datatype=["number", "number", "str"], type="array"),
    outputs=gr.JSON(),
    title="Robustness",
    description=module.description,
    article=(HERE / "README.md").read_text(encoding="utf-8").split("---", 2)[2],
)

if __name__ == "__main__":
    app.launch()
