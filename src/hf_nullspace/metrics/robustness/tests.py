"""Cases in the form of the `evaluate` template: what goes in, what comes out."""

test_cases = [
    {
        "predictions": [0, 1],
        "references": [0, 1],
        "condition": ["clean", "clean"],
        "result": {"accuracies": {"clean": 1.0}, "accuracy": 1.0, "worst_condition": "clean"},
    },
    {
        "predictions": [0, 1, 2, 2],
        "references": [0, 1, 2, 0],
        "condition": ["clean", "clean", "fog/1", "fog/1"],
        "result": {"accuracies": {"clean": 1.0, "fog/1": 0.5}, "worst_condition": "fog/1", "worst_accuracy": 0.5},
    },
]
