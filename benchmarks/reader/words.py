"""The words and sentences of the pages: each word is one token, and the reader's tower has learnt to read it."""

CITIES = (  # noqa: SIM905
    "Oslo Paris Rome London Berlin Madrid Vienna Dublin Athens Cairo Delhi Tokyo Lima Boston Chicago Denver "
    "Dallas Houston Miami Seattle Detroit Toronto Sydney Moscow Prague Warsaw Lisbon Geneva Venice Milan Naples "
    "Munich Hamburg Bristol Oxford York Nairobi Havana Mumbai Beijing Shanghai Manila Austin Phoenix Atlanta "
    "Orlando Memphis Portland"
).split()
NAMES = (  # noqa: SIM905
    "Anna Maria John Peter Paul Mark Luke David Daniel Thomas Robert James William Henry George Edward Charles "
    "Frank Jack Oliver Emma Sarah Laura Julia Emily Alice Jane Mary Susan Linda Helen Rachel Rebecca Martha "
    "Michael Kevin Brian Eric Adam Simon Martin Victor Oscar Samuel Benjamin Sophie Lucy Grace Rose"
).split()
JOBS = "teacher doctor farmer pilot baker lawyer artist writer singer driver painter nurse".split()  # noqa: SIM905
COLOURS = "red blue green yellow purple orange pink brown black gray".split()  # noqa: SIM905
TITLES = (  # noqa: SIM905
    "City News,Weekly Report,Travel Guide,Staff Notes,Market Review,Daily Facts,Local News,Sales Report,Team Notes,"
    "Annual Review"
).split(",")
FILLERS = (
    "The weather was mild.",
    "Work went on as planned.",
    "The roads were open all day.",
    "No other changes were made.",
    "The team met in the morning.",
    "Most of the visitors came by train.",
    "The price of food stayed the same.",
    "The old market was quiet.",
    "A new school was opened near the river.",
    "The meeting ended early.",
    "Several people asked for more time.",
    "The water level was normal.",
    "All of the lights were on.",
    "The report was sent to the office.",
    "The library was closed on Sunday.",
    "They saw many birds near the lake.",
    "The museum had a good year.",
    "Some of the trees were cut down.",
    "The next visit is in May.",
    "The garden looks nice in spring.",
    "Rain is expected next week.",
    "The bus was late again.",
    "It was a calm and sunny day.",
    "The small shop sells fresh bread.",
    "The city plans to build a park.",
)
