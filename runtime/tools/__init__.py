"""Tools: functions that a model may ask to have called, how models write that, and the loop that calls them."""

from edgephi.runtime.tools.functions import ToolCall as ToolCall
