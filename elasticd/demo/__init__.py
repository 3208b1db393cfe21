"""``elasticd demo``: a job that loses two of its nodes and gets two others, shown as it happens, and judged at its end.

The plan (plan.py) says what is done when; all that happened is one record (record.py), read from what the daemons and
the training script wrote down themselves; scene.py makes of it what the view shows, claims.py what is promised. All of
these are pure. driver.py plays the plan on a real cluster.
"""

from elasticd.demo.driver import run_demo
from elasticd.demo.plan import DemoOptions

__all__ = ["DemoOptions", "run_demo"]
