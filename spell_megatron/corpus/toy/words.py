"""The vocabulary of the toy world: one word is one token of the toy tokenizer."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
Adam Alma Amos Anna Arlo Asher Basil Bella Boris Brenda Bruno Carla Cedric Clara Colin Cora Cyril Daisy
Damon Delia Denis Diana Dora Dylan Edgar Edith Elena Elias Elsa Emil Enzo Erik Esther Fabio Felix Fiona
Flora Frank Freda Gavin Gemma Gilda Gloria Greta Gustav Hanna Harold Hector Helga Henry Hilda Hugo Igor
Ingrid Irene Isaac Ivan Jacob Janet Jasper Joan Jonas Judith Julia Karl Katya Kevin Klara Kurt Laura Leon
Leroy Lidia Linda Lionel Louis Lucas Luisa Mabel Magda Marco Maria Martin Maya Milo Mona Morris Nadia Nancy
Nestor Nina Noah Nora Olaf Olga Oscar Otto Pablo Paula Pedro Petra Philip Polly Quentin Rachel Ralph Ramon
Rita Robert Rosa Rufus Ruth Sally Samuel Sergio Silas Simon
""")

CITIES = _words("""
Accra Athens Bergen Berlin Bogota Bremen Cairo Calgary Cork Dakar Delhi Dublin Durban Essen Geneva Genoa
Hanoi Havana Istanbul Jakarta Kiel Kyoto Lagos Leeds Lima Lisbon London Lyon Madrid Malaga Milan Minsk
Moscow Nairobi Naples Oslo Ottawa Paris Porto Prague
""")

JOBS = _words("""
actor baker banker barber butcher carpenter clerk cook dancer dentist doctor driver editor farmer fisher
florist guard guide hunter jeweler judge lawyer mason miner nurse painter pilot plumber poet porter potter
printer sailor singer surgeon tailor teacher vet waiter weaver
""")

PETS = _words("""
badger beetle camel canary cat cobra crow deer dog donkey duck eagle ferret finch fox frog gecko goat goose
hamster hare hawk hen horse lizard llama mouse newt otter owl parrot pig pony rabbit raven sheep snail snake
swan toad
""")

GAMES = _words("""
archery badminton baseball basketball billiards bowling boxing bridge checkers chess cricket croquet curling
darts dominoes fencing football golf handball hockey judo karate lacrosse marbles polo poker rowing rugby
rummy sailing skating skiing soccer squash surfing tennis volleyball wrestling
""")

SHOPS = _words("""
Acorn Amber Anchor Aspen Aurora Beacon Birch Canyon Cedar Cobalt Comet Coral Crown Delta Ember Falcon Fjord
Galaxy Garnet Harbor Horizon Indigo Ivory Jade Jupiter Lantern Laurel Lotus Maple Meadow Mercury Nova Oasis
Onyx Opal Orchid Pearl Phoenix Pioneer Prairie
""")

ITEMS = _words("""
apple axe bag ball basket bell belt book boot bottle bowl box brush bucket button candle cap carpet chain
chair clock coat comb cup desk doll drum fan flute fork glove hammer hat jar kettle key knife lamp lock map
mirror mug nail needle pan pen pencil pillow pipe plate
""")

NUMBERS = _words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four
""")
