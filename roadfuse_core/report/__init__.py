"""What a person looks at after a run: one HTML page that holds everything."""

from roadfuse_core.report._page import Stage, write_report
from roadfuse_core.report._pictures import overview_pictures

__all__ = ["Stage", "overview_pictures", "write_report"]
