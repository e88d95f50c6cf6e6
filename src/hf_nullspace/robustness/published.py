"""Numbers of other people, quoted: AlexNet's errors on ImageNet-C and the paper's table 1. Never averaged with ours."""

# AlexNet's error in %, mean over severities, on ImageNet-C, and on clean images (torchvision's AlexNet);
# Hendrycks & Dietterich 2019, their repository. A reference for ImageNet-C only.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
ALEXNET_CLEAN_ERROR = 43.478


# Table 1 of the paper, quoted. Accuracies in %, except MIM (error) and C (mCE); None: not given.
TABLE_1_COLUMNS = (
    *("clean", "PatchFool", "CW", "MIM", "FGSM", "DAmageNet"),
    *("A", "C", "V2", "R", "Sketch", "Stylized", "average"),
)
_ROWS: dict[str, tuple[float | None, ...]] = {
    "ViT-S": (74.19, 0.68, 0.18, None, 13.79, 29.82, 16.35, 71.13, 62.51, 34.67, 14.26, 12.15, 31.85),
    "ViT-S + NS": (77.47, 19.10, 2.38, None, 25.95, 32.43, 20.77, 55.98, 66.5, 41.61, 25.67, 16.02, 38.94),
    "ViT-B": (77.68, 15.92, 0.56, 81.72, 25.65, 38.69, 23.88, 62.16, 66.05, 41.63, 16.31, 17.97, 38.41),
    "ViT-B + NS": (81.42, 23.52, 2.36, 74.72, 36.50, 40.44, 24.55, 47.82, 70.25, 44.85, 26.35, 19.02, 43.95),
    "ViT-B + DAT": (81.47, 22.64, 0.76, 70.28, 48.80, 43.31, 23.83, 45.95, 70.24, 48.68, 36.94, 23.99, 47.92),
    "ViT-B + DAT + NS": (81.33, 24.14, 0.88, 71.18, 48.98, 43.67, 24.22, 45.91, 70.14, 48.48, 37.25, 23.87, 48.01),
}
TABLE_1: dict[str, dict[str, float | None]] = {
    f"{name} (quoted)": dict(zip(TABLE_1_COLUMNS, row, strict=True)) for name, row in _ROWS.items()
}
