"""What a person looks at after a run: one HTML page that holds everything."""

from roadfuse_core.report._page import Stage, write_report
from roadfuse_core.report._pictures import map_preview, overview_pictures

__all__ = ["Stage", "map_preview", "overview_pictures", "write_report"]
