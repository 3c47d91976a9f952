"""150 everyday questions for evaluation only. Never use in training."""
_single = """What is the capital of France?
What should I cook tonight?
Tell me a joke.
Why is the sky blue?
How do I boil an egg?
What time zone is Tokyo in?
Who wrote Romeo and Juliet?
Give me three tips for sleeping better.
What is photosynthesis?
Write a haiku about autumn.
How many legs does a spider have?
Explain gravity to a five-year-old.
Translate "good morning" into Spanish.
What is the largest ocean?
Suggest a name for my new puppy.
How can I learn to play the guitar?
What is 17 + 25?
What is 144 divided by 12?
Compute 9 * 8.
If I have 3 apples and buy 5 more, how many do I have?
A train travels 60 miles in 1.5 hours. What is its average speed?
What is 15% of 200?
What is the square root of 81?
Is 91 a prime number?
Convert 10 kilometers to miles.
How many minutes are there in a day?
Write a Python function that reverses a string.
Write a for loop in JavaScript that prints 1 to 10.
How do I read a file line by line in Python?
What does SELECT * FROM users do in SQL?
Explain what a hash table is.
Fix this code: print("hello
What is the difference between a list and a tuple?
Write a regular expression that matches an email address.
How do I undo the last git commit?
def fibonacci(n):
What is recursion?
Write a bash command that counts the files in a directory.
Hello!
Hi, how are you?
Thanks
Good night
Who are you?
What can you do?
ok
Help
Yes
?
Bonjour, comment ça va ?
Quelle est la capitale de l'Italie ?
¿Cuál es el animal más rápido del mundo?
Cuéntame un chiste.
Was ist die Hauptstadt von Deutschland?
Wie spät ist es?
Erzähle mir eine kurze Geschichte.
Qual è la tua canzone preferita?
Come si fa la pizza?
O que é inteligência artificial?
今天天气怎么样？
日本の首都はどこですか？
Как тебя зовут?
Hoe gaat het met je?
Jak się masz?
Write a short email to my boss asking for a day off.
Write an apology letter to a friend whose birthday I forgot.
Summarize the plot of Hamlet in two sentences.
List five countries in Africa.
Name the planets of the solar system.
What are the primary colors?
How does a vaccine work?
What causes earthquakes?
Why do cats purr?
What is the meaning of life?
Recommend a good book about history.
What is the best way to lose weight?
How do airplanes fly?
What is inflation?
Describe the taste of a mango.
What's the difference between weather and climate?
Give me a recipe for pancakes.
How do I remove a red wine stain from a carpet?
What are the symptoms of a cold?
Should I learn Python or Java first?
What is a good gift for a ten-year-old?
Plan a weekend trip to Rome.
How do I change a flat tire?
What is the boiling point of water?
Who painted the Mona Lisa?
When did World War II end?
Who was the first person on the moon?
What is the tallest mountain in the world?
How far away is the sun?
What is DNA?
What is democracy?
Write a limerick about a cat.
Write the first sentence of a mystery novel.
Give me a synonym for happy.
What is the opposite of hot?
Use the word "serendipity" in a sentence.
Correct the grammar: "She don't like apples."
Is it "who" or "whom" in "To ___ did you speak?"
What rhymes with orange?
Classify the sentiment of: "The movie was a complete waste of time."
Extract the city from: "I moved to Boston last spring."
Rewrite in a formal tone: "hey, can u send me the file?"
Rewrite this sentence in the passive voice: The dog chased the ball.
What are the pros and cons of working from home?
My phone won't turn on, and I have an important call in an hour. I've already tried charging it with two different cables and holding the power button for thirty seconds. What else could I try before I take it to a repair shop?
I am writing an essay about the causes of the French Revolution, and I need a clear thesis statement as well as three supporting arguments. It should be suitable for a high school student. Can you help me outline it?
I have a dinner party on Saturday with eight guests, two of whom are vegetarian and one who is allergic to nuts. Could you suggest a three-course menu that everyone can enjoy?
Read this text and tell me what it is about: The industrial revolution transformed economies that had been based on agriculture and handicrafts into economies based on large-scale industry, mechanized manufacturing, and the factory system.
Can you explain, step by step, how a bill becomes a law in the United States, and mention at which points it can fail?
Yesterday my sister told me that she is moving abroad for two years. I'm happy for her, but I also feel sad. How can I support her without showing her how much I will miss her?
What is the phone number for emergency services?
Give me a random number between 1 and 10.
How many digits does pi have?
What year is it?
Who is Albert Einstein?
Who is Marie Curie?
Tell me about Leonardo da Vinci.
John is taller than Mary. Who is shorter?
Name: Sarah. Age: 30. Write a one-line introduction for her.
Shopping list:
Dear Sir or Madam,
Once upon a time
Q: What is the chemical symbol for gold? A:
To be or not to be,
Please stop."""
_system = [
    ("You are a pirate. Answer like one.", "Where can I find some food?"),
    ("You are a helpful math tutor.", "How do I solve 2x + 3 = 11?"),
    ("Answer in one word.", "What color is grass?"),
    ("You are a strict English teacher.", "Me and him goes to school."),
    ("You are a travel agent.", "I want to go somewhere warm in December."),
    ("You answer only in French.", "What is your name?"),
    ("You are a Python expert.", "How do I sort a dictionary by value?"),
    ("You are a doctor. Be brief.", "I have a headache."),
    ("Be very formal.", "hey what's up"),
    ("You are a poet.", "Write about the sea."),
    ("You are a customer support agent for a phone company.", "My bill is too high."),
    ("Reply with JSON only.", "Give me the name and the population of Canada."),
]
_turns = [
    ["Hi", "Hello! How can I help you today?", "Tell me something about whales."],
    ["What is 2 + 2?", "2 + 2 equals 4.", "And times three?"],
    ["I like hiking.", "That's great! Where do you usually hike?", "In the Alps."],
    ["Who wrote Faust?", "Faust was written by Johann Wolfgang von Goethe.", "When was he born?"],
    ["Recommend a movie.", "I recommend The Shawshank Redemption.", "I've seen it. Another one?"],
    ["What's the capital of Spain?", "The capital of Spain is Madrid.", "How many people live there?"],
    ["Write a function that adds two numbers.", "def add(a, b):\n    return a + b", "Now add type hints."],
    ["My name is Anna.", "Nice to meet you, Anna!", "What is my name?"],
    ["Translate cat into German.", "Katze", "And dog?"],
    ["I feel tired.", "I'm sorry to hear that. Did you sleep well?", "No, not really."],
    ["Tell me a joke.", "Why did the chicken cross the road? To get to the other side!", "Explain it."],
]
EVERYDAY = [[{"role": "user", "content": q}] for q in _single.split("\n")]
EVERYDAY += [[{"role": "system", "content": s}, {"role": "user", "content": u}] for s, u in _system]
EVERYDAY += [[{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), t)] for t in _turns]
if __name__ == "__main__":
    print(len(EVERYDAY), len({str(e) for e in EVERYDAY}))
