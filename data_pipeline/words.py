"""Common English nouns used as keys and variable names of the synthetic tasks."""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    apple arrow autumn badge baker ball bank basket beach bell bench bird blanket boat bone book bottle bowl box
    branch bread brick bridge brush bucket button cabin cake camel camera candle canyon cap card carpet castle
    cat cave chain chair cheese cherry child church circle clock cloud coast coat coffee coin corner cotton
    cousin cow crown cup curtain dance desert desk diamond dinner doctor dog doll door dragon dream dress drum
    duck eagle ear earth east egg elbow engine evening eye face farm father feather fence field finger fire fish
    flag flame floor flower forest fork fox friend frog fruit garden gate ghost giant glass glove goat gold
    goose grain grape grass guitar hammer hand harbor hat heart hill honey hook horse hotel house ice inch ink
    iron island jacket jar jewel judge juice jungle kettle key king kitchen kite knee knife ladder lady lake
    lamb lamp leaf leather lemon letter library light lion lip lock machine mango map marble market meadow metal
    milk mill mirror money monkey moon morning mother mountain mouse mouth music nail neck needle nest night
    north nose nurse ocean oil olive onion orange oven owl paint palace paper park path pen pencil pepper piano
    picture pig pillow pilot pine pipe planet plate pocket poem pond potato prince queen rabbit radio rain
    ribbon rice ring river road robe rock roof room root rope rose sail salt sand school sea seed shadow sheep
    shell ship shirt shoe shop shoulder silk silver sister sky smoke snake snow soap sock soldier song soup
    south spider spoon spring square stable stage star station stone storm story stove street sugar summer sun
    table tail teacher temple tent thread throne thumb tiger tongue tower town toy train tree truck tunnel
    turtle uncle valley vase village violin voice wagon wall watch water wave week west wheel whistle wife wind
    window wing winter wolf wood wool yard
    """.split()
)

QUALITIES: tuple[str, ...] = tuple(
    """
    amber ancient bitter black blue bold brave bright broken brown calm clever cold cool crimson dark deep dry
    early empty faint fair fast fresh gentle golden grand gray green happy heavy hidden high hollow honest
    humble kind large late light little lonely long loud low lucky merry mild modern narrow new noble old pale
    plain proud purple quick quiet rare red rich rough round royal rusty sad sharp short silent simple small
    smooth soft sour strange strong sweet swift tall tame tender thick thin tiny violet warm weak wet white wide
    wild wise yellow young
    """.split()
)
