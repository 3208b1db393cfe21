"""The composition root: joins the core with its adapters, in one loop."""
