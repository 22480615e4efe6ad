"""One row of each evaluation set in the columns that its publishers chose; questions and answers are our own."""

from __future__ import annotations

_PYTHON = {
    "completion": "class Solution:\n    def twoSum(self, nums, target):\n        return [0, 1]\n",
    "entry_point": "Solution().twoSum",
    "input_output": [{"input": "nums = [1, 2], target = 3", "output": "[0, 1]"}],
    "prompt": "from typing import *\n",
    "response": "Here is the code.",
    "task_id": "two-sum",
    "test": "def check(candidate):\n    assert candidate(nums = [1, 2], target = 3) == [0, 1]\n",
}
_STARTER = "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:"

ROWS = {
    "gsm8k": {
        "question": "A mill grinds 40 sacks a day. How many in 30 days?",
        "answer": "It grinds 40*30=<<40*30=1200>>1200 sacks.\n#### 1,200",
    },
    "math500": {
        "problem": "What is $5 - \\frac13$? Give a common fraction.",
        "solution": "It is $\\boxed{\\frac{14}{3}}$.",
        "answer": "\\frac{14}{3}",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/algebra/1.json",
    },
    "aime24": {
        "id": 60,
        "problem": "How many such pairs are there?",
        "solution": "There are 33.",
        "answer": "033",
        "url": "https://example.org/1",
        "year": "2024",
    },
    "aime25": {"problem": "Find the angle in degrees.", "answer": "336^\\circ", "id": "0"},
    "mmlu_pro": {
        "question_id": 70,
        "question": "How much is two and two?",
        "options": ["three", "four", "five", "N/A", "N/A"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": "",
        "category": "math",
        "src": "own",
    },
    "gpqa": {
        "Record ID": "rec1",
        "Question": "How much is two and two?\n",
        "Correct Answer": "four\n",
        "Incorrect Answer 1": "five",
        "Incorrect Answer 2": "six",
        "Incorrect Answer 3": "seven",
        "High-level domain": "Physics",
        "Subdomain": "Optics",
    },
    "leetcode": _PYTHON
    | {
        "question_id": 1,
        "difficulty": "Easy",
        "tags": ["Array"],
        "problem_description": "Find two numbers that add up to the target.",
        "starter_code": _STARTER + "\n        ",
        "estimated_date": "2015-08-07",
        "query": "You are an expert. Find two numbers.",
    },
}

EARLY_LEETCODE = _PYTHON | {
    "query": "Find two numbers that add up to the target.\nPlease complete the following python code precisely:\n"
    f"```python\n{_STARTER}\n```",
    "meta": {"question_id": 1, "difficulty": "Easy", "lang_code": _STARTER},
}
