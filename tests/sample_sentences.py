"""Sentences on which accuracy is measured; none of them was seen in calibration or in choosing how to calibrate."""

SENTENCES = (
    "Good morning!",
    "The baker's daughter taught herself to juggle with lemons.",
    "Why do cats purr?",
    "Enzymes speed up reactions by lowering the energy they need to start.",
    "A strike by dock workers held up container ships in three ports and left supermarkets without bananas for a week.",
    "Sold out.",
    'print("the answer is", 6 * 7)',
    "The goalkeeper saved two penalties and was carried off the pitch on the shoulders of the fans.",
    "If you miss a dose, skip it and go on with the next one at the usual time.",
    "When was the printing press invented, and by whom?",
    "A late frost killed most of the apricot blossom.",
    "Chop the onions finely.",
    "The tenant may end the agreement with three months' notice, which must be given in writing and reach the "
    "landlord by the "
    "third working day of the month, failing which it takes effect one month later.",
    "Gravity bends light.",
    "The headphones sound wonderful, but the left one stopped working after a fortnight and support never replied.",
    "Flight LX 318 to Zurich is now boarding at gate B24.",
    "Nobody knew.",
    "In the attic they found a globe on which half of Africa was still blank, a stuffed owl, and eleven diaries in "
    "a hand so "
    "small that it took a magnifying glass to read them.",
    "fatal: not a git repository (or any of the parent directories)",
    "Peat bogs hold twice as much carbon as all the forests of the world.",
    "Can I bring my bicycle on the night train?",
    "Archaeologists dated the wooden bowl to the early Iron Age.",
    "The company cut its forecast for the year, and the shares lost a fifth of their value within an hour.",
    "Bees tell each other where flowers are by dancing.",
    "Because the sensor reported its position only ten times a second while the arm moved at two metres a second, the "
    "controller had to guess where the gripper would be, and on the third day of testing it guessed wrong and "
    "swept a tray of "
    "samples off the bench.",
    "DELETE FROM sessions WHERE expires < NOW();",
    "It rained.",
    "A refrigerator warms the kitchen in which it stands.",
    "After the flood the monks moved the library to the bell tower.",
    "Hash tables trade memory for speed.",
    "This curry would be perfect with a little less chilli.",
    "How far is it from Madrid to Seville by car?",
    "The poet burned her early work and never spoke of it again.",
    "Saturn's rings are made of ice and dust.",
    "They charged my card twice and I want one of the payments back.",
    "Unemployment among the young fell for the third quarter in a row.",
    "The conductor raised his baton, and four hundred singers drew breath.",
    "Antibiotics do nothing against a cold.",
    "Hurry up!",
    "Volunteers planted nine thousand oaks along the motorway last autumn.",
)
