"""The viewer as a notebook's widget; imported only where it is shown, as anywidget is an extra."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rdd_pipeline.inspection.viewer import static
from rdd_storage import ExtraNotInstalledError, RddError

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ExtraNotInstalledError(
        "anywidget is needed for the widget; install it with: pip install 'rdd-maps[notebooks]', "
        "or write a page with viewer_page()"
    ) from error

if TYPE_CHECKING:
    from rdd_pipeline.inspection.viewer import Viewer

_LOGGER = logging.getLogger(__name__)

QUANTITIES = ("hardness", "uncertainty", "discrepancy", "weight")
"""What the coloured panel and the threshold are about; uncertainty is 1 - confidence."""


class ViewerWidget(anywidget.AnyWidget):
    """Answers the browser's message ``{"type": "load", "index": i}`` with image ``i``.

    The answer is ``{"type": "image", "index": i, "header": ...}`` with the arrays as binary
    buffers, or ``{"type": "error", "index": i, "message": ...}``. Nothing larger than the list of
    names is kept in the widget's state.
    """

    _esm = static("viewer.js")
    _css = static("viewer.css")
    meta = traitlets.Dict().tag(sync=True)
    index = traitlets.Int(0, help="place of the shown image, from 0").tag(sync=True)
    quantity = traitlets.Enum(QUANTITIES, "hardness").tag(sync=True)
    opacity = traitlets.Float(0.6, min=0.0, max=1.0).tag(sync=True)
    threshold = traitlets.Float(
        None, allow_none=True, help="in the quantity's unit; None shows all"
    ).tag(sync=True)

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        super().__init__(meta=viewer.meta)
        self.on_msg(self._answer)

    def __repr__(self) -> str:
        return f"ViewerWidget({self._viewer!r})"

    @traitlets.validate("index")
    def _check_index(self, proposal: Any) -> int:
        index, images = int(proposal["value"]), len(self.meta["images"])
        if not 0 <= index < images:
            raise traitlets.TraitError(f"index: expected 0 to {images - 1}, got {index}")
        return index

    def _answer(self, _: Any, content: Any, __: list[bytes]) -> None:
        index = content.get("index") if isinstance(content, dict) else None
        if not isinstance(index, int) or content.get("type") != "load":
            return  # not a message of this viewer
        if not 0 <= index < len(self.meta["images"]):
            self.send({"type": "error", "index": index, "message": f"there is no image {index}"})
            return
        try:
            record = self._viewer.record(index)
        except (RddError, OSError) as error:
            _LOGGER.warning("image %s cannot be shown: %s", index, error)
            self.send({"type": "error", "index": index, "message": str(error)})
            return
        self.send({"type": "image", "index": index, "header": record.header}, record.buffers)
