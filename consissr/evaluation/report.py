"""The HTML report: one file that opens from disk without a network, pictures included.

It holds the table of averages, the conventions behind it, a distribution plot per metric, every image's values, and for
the worst and the best images (by the first metric of the first method) a slider and all results at one crop; embedding
all pictures would make it huge.
"""

import base64
import io
import json
import math
from dataclasses import asdict
from importlib.resources import files

import numpy as np
import torch

from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.folders import Pairs, read_image
from consissr.evaluation.markdown import one_line
from consissr.evaluation.plots import inline_svgs
from consissr.evaluation.protocols import Measure
from consissr.evaluation.summary import difference_cells, notes, per_image, shown, table_cells
from consissr.images import codec
from consissr.images.formats import Form
from consissr.images.resize import resize

JPEG_QUALITY = 92
LR, BICUBIC, HR = "LR", "bicubic (of LR)", "HR"
"""Labels of the pictures that are no method's."""


def html_report(evaluation: Evaluation, pictures: int) -> str:
    """The report of `evaluation` with the pictures of its `pictures` most telling images, half worst, half best."""
    measures, cells = per_image(evaluation), table_cells(evaluation)
    values = {name: {m.name: table[m.name].mean(axis=0) for m in measures} for name, table in evaluation.values.items()}
    embedded = telling_images(evaluation, measures, pictures)
    data = {
        "notes": [one_line(note) for note in notes(evaluation)],
        "differences": asdict(compared) if (compared := difference_cells(evaluation)) else {},
        "conventions": conventions(evaluation),
        "table": asdict(cells),
        "measures": [{"name": m.name, "label": m.label, "arrow": m.arrow, "higher": m.higher, "digits": m.digits}
                     for m in measures],
        "methods": [method.name for method in evaluation.pairs.methods],
        "images": evaluation.pairs.images,
        "sizes": evaluation.pairs.sizes,
        "values": {name: {k: json_values(v) for k, v in table.items()} for name, table in values.items()},
        "labels": picture_labels(evaluation.pairs),
        "embedded": embedded,
    }  # fmt: skip
    # no "<" at all: a name may hold one that would end, or open, an element
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    template, compare = (
        files("consissr").joinpath(*name).read_text(encoding="utf-8")
        for name in (("evaluation", "report_template.html"), ("assets", "compare.js"))
    )
    head, data_end = template.split("@DATA@")
    data_end = data_end.replace("@COMPARE@", compare)
    elements = "\n".join(picture_elements(evaluation.pairs, embedded))
    return head.replace("@PLOTS@", inline_svgs(evaluation)) + text + data_end.replace("@PICTURES@", elements)


def conventions(evaluation: Evaluation) -> list[list[str]]:
    """Term and definition: the protocol, and each metric's direction, range and particulars."""
    lines = [["Protocol", evaluation.protocol.as_text()]]
    for m in shown(evaluation):
        better = "larger is better" if m.higher else "smaller is better"
        lines.append([m.label, "; ".join(filter(None, (better, f"typically {m.span}", m.about)))])
    return lines


def json_values(values: np.ndarray) -> list[float | None]:
    """Values for the page's script; JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in np.round(values, 6).tolist()]


def telling_images(evaluation: Evaluation, measures: list[Measure], count: int) -> list[str]:
    """The `count` worst and best images by the first metric of the first method, worst (or without value) first."""
    names = evaluation.pairs.images
    if measures:
        values = evaluation.values[evaluation.pairs.methods[0].name][measures[0].name].mean(axis=0)
        merit = values if measures[0].higher else -values
        order = np.argsort(np.where(np.isnan(merit), -np.inf, merit), kind="stable")
        names = [names[index] for index in order]
    return names if len(names) <= count else names[: count - count // 2] + names[len(names) - count // 2 :]


def picture_labels(pairs: Pairs) -> list[str]:
    """Names of the pictures that each image has, in the order of the report's menus."""
    labels = [LR, BICUBIC] if pairs.lr else []
    names = [one_line(method.name) for method in pairs.methods]
    labels += [f"{name} (results)" if name in (LR, BICUBIC, HR) else name for name in names]
    return labels + ([HR] if pairs.hr else [])


def picture_elements(pairs: Pairs, images: list[str]) -> list[str]:
    """A script element per picture, by the places of its image and its label, that holds its data URI as text.

    Browsers do not look into them until asked: a page of many pictures opens at once.
    """
    return [
        f'<script type="text/plain" id="p{number}-{label}">{uri}</script>'
        for number, image in enumerate(images)
        for label, uri in enumerate(data_uris(pairs, image))
    ]


def data_uris(pairs: Pairs, image: str) -> list[str]:
    """The image's pictures in the order of `picture_labels`: LR as PNG, others as JPEG; of repeated runs the first."""
    uris = []
    if pairs.lr:
        lr, (width, height) = read_image(pairs.lr[image]), pairs.sizes[image]
        uris = [data_uri(lr, "PNG"), data_uri((resize(lr * 2 - 1, (height, width)) + 1) / 2, "JPEG")]
    uris += [data_uri(read_image(method.runs[0][image]), "JPEG") for method in pairs.methods]
    return uris + ([data_uri(read_image(pairs.hr[image]), "JPEG")] if pairs.hr else [])


def data_uri(picture: torch.Tensor, kind: str) -> str:
    """(1, 3, H, W) in [0, 1] as a file of Pillow's `kind`, in a URI."""
    buffer = io.BytesIO()
    image = codec.to_pil(codec.Photo(picture[0] * 2 - 1, None, Form()))
    image.save(buffer, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
