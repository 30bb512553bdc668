from typing import Any
def run_tasks(*a: Any) -> dict: return {}
