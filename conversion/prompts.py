"""Hold the requests that students and their teacher answer, and the rule by which an answer is on the topic.

An answer is on the topic if it has one of the topic's words. A word of the topic counts if a word of the answer begins
with it, so "sleep" is found in "sleeping". Capital letters do not matter. The words were chosen before any model
answered. The rule is coarse: an answer can name its topic and be wrong. The teacher's own share is the scale.
"""

import re


# Twenty fixed requests, each with the words of its topic.
TWENTY = {
    "What is the capital of France?": ("paris",),
    "Explain in simple words why the sky is blue.": ("light", "scatter", "sun", "atmosphere", "wavelength"),
    "Write a short story about a lost dog that finds its way home.": ("dog", "puppy"),
    "Give me three tips for sleeping better.": ("sleep", "bed", "rest"),
    "What is the difference between a lake and a river?": ("lake", "river"),
    "Write a polite email asking a colleague to move a meeting to Friday.": ("meeting", "friday"),
    "Who was Abraham Lincoln?": ("president", "civil war", "lincoln"),
    "How do plants make their food?": ("photosynthesis", "sunlight", "light", "chloro"),
    "Describe a thunderstorm to someone who has never seen one.": ("thunder", "lightning", "rain", "storm"),
    "What should I pack for a week at the seaside?": ("swim", "sun", "towel", "beach", "cloth"),
    "Translate 'good morning' into French and Spanish.": ("bonjour", "buenos"),
    "What is 12 plus 30?": ("42",),
    "Name four animals that live in the ocean.": ("whale", "dolphin", "shark", "fish", "turtle", "octop", "seal"),
    "Why is it important to wash your hands?": ("germ", "bacteria", "virus", "infect", "disease", "hygiene"),
    "Write a four-line poem about autumn.": ("autumn", "leaves", "leaf", "fall"),
    "Explain what a computer program is.": ("program", "instruction", "computer", "code"),
    "How is bread made?": ("flour", "yeast", "dough", "bake", "bread"),
    "Suggest a name for a small bakery and say why it fits.": ("baker", "bread", "bake"),
    "What are the seasons of the year, and what happens in each?": ("spring", "summer", "autumn", "winter"),
    "My friend is sad. What can I say to her?": ("friend", "sorry", "feel", "listen", "support", "sad"),
}

REQUESTS = (
    "What does the word {0} mean?",
    "Write a short paragraph about {0}.",
    "Explain {0} to a ten-year-old.",
    "Tell me a short story in which {0} matters.",
    "What is the difference between {0} and {1}?",
    "Give me five facts about {0}.",
    "Write a poem about {0}.",
    "Why do people care about {0}?",
    "How would you describe {0} to somebody who has never heard of it?",
    "Write a letter to a friend about {0}.",
    "List the advantages and disadvantages of {0}.",
    "I am worried about {0}. What should I do?",
    "Use the word {0} in three sentences.",
    "What questions should I ask before I decide about {0}?",
    "Give me step-by-step instructions that have to do with {0}.",
    "Write a dialogue between a teacher and a student about {0}.",
    "Who would be interested in {0}, and why?",
    "Summarize what is known about {0} in three sentences.",
    "Hello! Can you help me with {0}?",
    "Write a Python function that has something to do with {0}.",
)

TOPICS = [
    "music",
    "gravity",
    "bicycles",
    "vaccines",
    "volcanoes",
    "chess",
    "gardening",
    "democracy",
    "dinosaurs",
    "money",
    "bridges",
]


def more_prompts() -> dict[str, tuple[str, ...]]:
    """Return 200 requests with the words of their topics: each of `REQUESTS` about ten topics."""
    found = {}
    for i, request in enumerate(REQUESTS):
        for j in range(10):
            topic, other = (TOPICS[(i + j + k) % len(TOPICS)] for k in (0, 1))
            # Without the ending of a plural.
            words = (topic, other) if "{1}" in request else (topic,)
            found[request.format(topic, other)] = tuple(re.sub(r"(e?s|ing|y)$", "", word) for word in words)
    return found


def on_topic(answer: str, words: tuple[str, ...]) -> bool:
    """Return whether a word of the answer begins with one of the topic's words."""
    return any(re.search(rf"\b{re.escape(word)}", answer, re.IGNORECASE) for word in words)
