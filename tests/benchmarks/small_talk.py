"""Turns that need nothing remembered: greetings, thanks, assent, chatter, wishes for a text about the world."""

from __future__ import annotations

__all__ = ["SMALL_TALK"]

SMALL_TALK = """
Hi
Hello!
Hi, how are you?
Hey there
Good morning
Good evening!
hey, what's up?
How's it going?
How are you doing today?
yo
Hello, nice to meet you
Good night
Bye!
See you later
talk to you tomorrow
Goodbye and take care
Have a nice day
Thanks!
Thank you so much
thanks, that helps
Thanks a lot, that was great
ok thanks
Great, thank you!
Perfect, thanks.
That's very helpful, thank you
I appreciate it
ok
OK.
Okay, got it
sure
Yes
yes please
No
no thanks
Nope
Right
I see
Makes sense
Sounds good
Cool
Nice!
wow
That's amazing
Great idea
haha that's funny
lol
hmm
Interesting
Really?
Are you sure?
Exactly
never mind
Go on
Please continue
Continue
Tell me more
Can you repeat that?
What do you mean?
Sorry, I didn't get that
Could you say that again?
One moment please
Wait
Stop
Let me think about it
I'll get back to you
No worries
You're welcome
My bad
Oops
Who are you?
What can you do?
Are you a robot?
Are you human?
What's your name?
Do you have feelings?
Tell me a joke
Tell me another joke
Tell me a fun fact
Write a haiku about rain
Write a haiku about autumn leaves
Write a short poem about the sea
Write a limerick about a parrot
Sing me a song
What is 17 times 23?
What's the square root of 144?
What is the capital of Mongolia?
How many ounces are in a pound?
Convert 10 miles to kilometers
What does the word ubiquitous mean?
How do you spell accommodate?
Translate hello into Japanese
How do I say thank you in Portuguese?
Who wrote Hamlet?
When did the Second World War end?
What's the boiling point of water at sea level?
Why is the sky blue?
How far away is the moon?
What is photosynthesis?
Explain quantum entanglement in one sentence
Explain recursion like I'm five
Define entropy
What is the tallest mountain on Earth?
Which planet is the largest?
What is the chemical symbol for gold?
How do magnets work?
What's the speed of light?
Who painted the Mona Lisa?
Flip a coin
Roll a dice
Pick a number between 1 and 10
Count to ten
Say something nice
Give me a synonym for happy
Give me a random word
Make this sentence shorter
Rewrite this more politely
Fix the grammar: he go to school
Summarize the text above
Use bullet points please
Answer in one word
Reply in German
Shorter please
Can you make it longer?
Try again
Do it again
Undo that
Start over
Let's change the subject
What time is it?
What day is it today?
What's the weather like?
Is it going to rain tomorrow?
Testing, one two three
test
asdf
?
...
:)
Good job
Well done
You're funny
I'm bored
Not really
Maybe
I don't know
Whatever
Of course
Absolutely
Fair enough
That's all for now
That's it
Nothing, just saying hi
I was just wondering
Long time no see
Happy new year!
Merry Christmas
Cheers
""".strip().splitlines()
