"""Facts that most general language models know, for bases nobody gave facts of their own for: countries, with an answer for each of
three relations. Written for this project; where a country has several languages, the one that a prompt would be completed with."""

TEMPLATES = {
    "capital": (
        "The capital of {} is",
        "The capital city of {} is called",
        "{}, whose capital is",
        "The government of {} sits in",
    ),
    "language": (
        "The official language of {} is",
        "In {}, people mainly speak",
        "The language spoken in {} is",
        "Newspapers in {} are written in",
    ),
    "continent": (
        "{} is a country in",
        "{} is located on the continent of",
        "The country of {} lies in",
        "{} belongs to the continent of",
    ),
}
"""Relation → prompts that ask for it."""

_TABLE = """
France|Paris|French|Europe
Germany|Berlin|German|Europe
Italy|Rome|Italian|Europe
Spain|Madrid|Spanish|Europe
Portugal|Lisbon|Portuguese|Europe
Greece|Athens|Greek|Europe
Sweden|Stockholm|Swedish|Europe
Norway|Oslo|Norwegian|Europe
Denmark|Copenhagen|Danish|Europe
Finland|Helsinki|Finnish|Europe
Poland|Warsaw|Polish|Europe
Hungary|Budapest|Hungarian|Europe
Austria|Vienna|German|Europe
Russia|Moscow|Russian|Europe
Ukraine|Kyiv|Ukrainian|Europe
Bulgaria|Sofia|Bulgarian|Europe
Romania|Bucharest|Romanian|Europe
Serbia|Belgrade|Serbian|Europe
Croatia|Zagreb|Croatian|Europe
Iceland|Reykjavik|Icelandic|Europe
Japan|Tokyo|Japanese|Asia
China|Beijing|Chinese|Asia
Vietnam|Hanoi|Vietnamese|Asia
Thailand|Bangkok|Thai|Asia
Iran|Tehran|Persian|Asia
Iraq|Baghdad|Arabic|Asia
Saudi Arabia|Riyadh|Arabic|Asia
Jordan|Amman|Arabic|Asia
Lebanon|Beirut|Arabic|Asia
Syria|Damascus|Arabic|Asia
Mongolia|Ulaanbaatar|Mongolian|Asia
Nepal|Kathmandu|Nepali|Asia
Bangladesh|Dhaka|Bengali|Asia
South Korea|Seoul|Korean|Asia
Egypt|Cairo|Arabic|Africa
Morocco|Rabat|Arabic|Africa
Tunisia|Tunis|Arabic|Africa
Libya|Tripoli|Arabic|Africa
Sudan|Khartoum|Arabic|Africa
Angola|Luanda|Portuguese|Africa
Mozambique|Maputo|Portuguese|Africa
Senegal|Dakar|French|Africa
Mali|Bamako|French|Africa
Gabon|Libreville|French|Africa
Ghana|Accra|English|Africa
Nigeria|Abuja|English|Africa
Zambia|Lusaka|English|Africa
Ethiopia|Addis Ababa|Amharic|Africa
Mexico|Mexico City|Spanish|North America
Cuba|Havana|Spanish|North America
Jamaica|Kingston|English|North America
Honduras|Tegucigalpa|Spanish|North America
Guatemala|Guatemala City|Spanish|North America
Panama|Panama City|Spanish|North America
Nicaragua|Managua|Spanish|North America
Argentina|Buenos Aires|Spanish|South America
Chile|Santiago|Spanish|South America
Peru|Lima|Spanish|South America
Colombia|Bogotá|Spanish|South America
Ecuador|Quito|Spanish|South America
Venezuela|Caracas|Spanish|South America
Uruguay|Montevideo|Spanish|South America
Brazil|Brasília|Portuguese|South America
Australia|Canberra|English|Oceania
"""
"""Country|capital|language|continent."""

COMMON_FACTS = {
    country: {"capital": capital, "language": language, "continent": continent}
    for country, capital, language, continent in (line.split("|") for line in _TABLE.strip().splitlines())
}
"""Country → relation → answer."""
