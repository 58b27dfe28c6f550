"""What must happen at once in Redis, as scripts that it runs.

Keys, below the prefix: a stream of calls for each urgency (`calls:high`, `calls:medium`, `calls:low`), read by one
consumer group; for each owner a stream of answers (`answers:<owner>`) and a hash of tickets (`tickets:<owner>`); and a
stream of dead letters (`dead`).

A ticket says which entry is the valid one of an item: "attempt stream entry". It is written with the entry, and an
entry without its ticket is dropped wherever it is met: so to cancel an item, or to dispatch it anew, is to change its
ticket. An entry is deleted when it has ended, but the newest one that was delivered only when it is that no longer:
otherwise Redis would not know the group's `lag` (null in XINFO GROUPS where the range after the last delivered entry,
itself included, has a deleted one).
Sources: https://redis.io/docs/latest/develop/data-types/streams/, the pages of the X* commands, and
`streamRangeHasTombstones` in Redis' src/t_stream.c.
"""

from __future__ import annotations

from typing import Final

GROUP: Final = "workers"

_FIELDS: Final = """
local function fields(list)
    local found = {}
    for i = 1, #list, 2 do found[list[i]] = list[i + 1] end
    return found
end
local function delivered(stream, group)
    for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
        local about = fields(info)
        if about['name'] == group then return about['last-delivered-id'] end
    end
end
local function drop(stream, group, id)
    local first = redis.call('XACK', stream, group, id)
    if first == 1 and id ~= delivered(stream, group) then redis.call('XDEL', stream, id) end
    return first
end
"""

PUBLISH: Final = """
-- KEYS tickets; ARGV owner, seconds that tickets are kept, then stream, item, attempt, call of each. Returns entries.
local entries = {}
for i = 3, #ARGV, 4 do
    local stream, item, attempt = ARGV[i], ARGV[i + 1], ARGV[i + 2]
    local id = redis.call('XADD', stream, '*', 'owner', ARGV[1], 'item', item, 'attempt', attempt, 'call', ARGV[i + 3])
    redis.call('HSET', KEYS[1], item, attempt .. ' ' .. stream .. ' ' .. id)
    entries[#entries + 1] = id
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return entries
"""

TAKE: Final = (
    _FIELDS
    + """
-- KEYS streams, most urgent first; ARGV group, consumer, most, idle milliseconds after which an entry is taken from
-- another consumer (0: none is), deliveries allowed, prefix, dead letters kept, seconds that answers are kept.
-- Returns entries {stream, id, owner, item, attempt, call}; the last id delivered of each stream; how many of the
-- entries were redelivered, and how many were buried instead.
local group, me, most, idle = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local taken, last, again, buried = {}, {}, 0, 0

local function bury(stream, id, f, deliveries)
    redis.call('XADD', ARGV[6] .. ':dead', 'MAXLEN', '~', ARGV[7], '*', 'owner', f.owner, 'item', f.item,
        'attempt', f.attempt, 'deliveries', deliveries, 'call', f.call)
    local answers = ARGV[6] .. ':answers:' .. f.owner
    redis.call('XADD', answers, '*', 'item', f.item, 'attempt', f.attempt, 'kind', 'dead', 'payload', deliveries - 1)
    redis.call('EXPIRE', answers, ARGV[8])
    redis.call('HDEL', ARGV[6] .. ':tickets:' .. f.owner, f.item)
    drop(stream, group, id)
    buried = buried + 1
end

local function consider(stream, entry, deliveries)
    local id, f = entry[1], fields(entry[2])
    local ticket = f.owner and f.item and f.attempt and f.call
        and redis.call('HGET', ARGV[6] .. ':tickets:' .. f.owner, f.item)
    if not ticket or ticket ~= f.attempt .. ' ' .. stream .. ' ' .. id then
        drop(stream, group, id)
    elseif deliveries > tonumber(ARGV[5]) then
        bury(stream, id, f, deliveries)
    else
        taken[#taken + 1] = {stream, id, f.owner, f.item, f.attempt, f.call}
        if deliveries > 1 then again = again + 1 end
    end
end

for n, stream in ipairs(KEYS) do
    local cursor = '0-0'
    while idle > 0 and #taken < most do
        local claimed = redis.call('XAUTOCLAIM', stream, group, me, idle, cursor, 'COUNT', most - #taken)
        for _, entry in ipairs(claimed[2]) do
            consider(stream, entry, redis.call('XPENDING', stream, group, entry[1], entry[1], 1)[1][4])
        end
        cursor = claimed[1]
        if cursor == '0-0' then break end
    end
    local before = delivered(stream, group)
    while #taken < most do
        local read = redis.call('XREADGROUP', 'GROUP', group, me, 'COUNT', most - #taken, 'STREAMS', stream, '>')
        if not read then break end
        for _, entry in ipairs(read[1][2]) do consider(stream, entry, 1) end
    end
    last[n] = delivered(stream, group)
    if last[n] ~= before and #redis.call('XPENDING', stream, group, before, before, 1) == 0 then
        redis.call('XDEL', stream, before)
    end
end
return {taken, last, again, buried}
"""
)

EXTEND: Final = (
    _FIELDS
    + """
-- ARGV group, consumer, prefix, then stream, id, owner, item, attempt of each. Returns the numbers of those that this
-- consumer has lost, from 0. To claim with JUSTID begins the idle time anew and counts no delivery.
local group, me, lost = ARGV[1], ARGV[2], {}
for i = 4, #ARGV, 5 do
    local stream, id = ARGV[i], ARGV[i + 1]
    local ticket = redis.call('HGET', ARGV[3] .. ':tickets:' .. ARGV[i + 2], ARGV[i + 3])
    local mine = #redis.call('XPENDING', stream, group, id, id, 1, me) > 0
    if mine and ticket == ARGV[i + 4] .. ' ' .. stream .. ' ' .. id then
        redis.call('XCLAIM', stream, group, me, 0, id, 'JUSTID')
    else
        if mine then drop(stream, group, id) end
        lost[#lost + 1] = (i - 4) / 5
    end
end
return lost
"""
)

ANSWER: Final = (
    _FIELDS
    + """
-- KEYS stream, answers, tickets; ARGV group, id, item, attempt, kind, payload, seconds that answers are kept.
-- Ends the entry and tells its owner, unless kind is empty. Returns 1 if nobody had ended the entry before.
local first = drop(KEYS[1], ARGV[1], ARGV[2])
if redis.call('HGET', KEYS[3], ARGV[3]) == ARGV[4] .. ' ' .. KEYS[1] .. ' ' .. ARGV[2] then
    redis.call('HDEL', KEYS[3], ARGV[3])
end
if ARGV[5] ~= '' then
    redis.call('XADD', KEYS[2], '*', 'item', ARGV[3], 'attempt', ARGV[4], 'kind', ARGV[5], 'payload', ARGV[6])
    redis.call('EXPIRE', KEYS[2], ARGV[7])
end
return first
"""
)

ANSWERS: Final = "return redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[1])"
"""KEYS answers; ARGV how many."""

FORGET: Final = """
-- KEYS tickets; ARGV item, ticket of each. Takes back the tickets that have not been written anew.
for i = 1, #ARGV, 2 do
    if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
"""

MISSING: Final = """
-- ARGV stream, id of each. Returns the numbers of those that do not exist, from 0.
local missing = {}
for i = 1, #ARGV, 2 do
    if #redis.call('XRANGE', ARGV[i], ARGV[i + 1], ARGV[i + 1]) == 0 then missing[#missing + 1] = (i - 1) / 2 end
end
return missing
"""

MEASURE: Final = (
    _FIELDS
    + """
-- KEYS streams, dead letters; ARGV group, idle milliseconds after which a consumer that holds nothing is forgotten.
-- Returns {entries that wait, entries that are worked on} of each stream, then the number of dead letters.
local counts = {}
for n = 1, #KEYS - 1 do
    for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[n])) do
        local about = fields(info)
        if about['name'] == ARGV[1] then
            local waiting = about['lag'] or redis.call('XLEN', KEYS[n]) - about['pending']
            counts[n] = {math.max(0, waiting), about['pending']}
        end
    end
    for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[n], ARGV[1])) do
        local about = fields(info)
        if about['pending'] == 0 and about['idle'] > tonumber(ARGV[2]) then
            redis.call('XGROUP', 'DELCONSUMER', KEYS[n], ARGV[1], about['name'])
        end
    end
end
counts[#KEYS] = redis.call('XLEN', KEYS[#KEYS])
return counts
"""
)

LEAVE: Final = """
-- KEYS streams; ARGV group, consumer. What it still holds looks long forsaken, so that others take it at once; a
-- consumer that holds nothing is deleted.
for _, stream in ipairs(KEYS) do
    local held = redis.call('XPENDING', stream, ARGV[1], '-', '+', 1000, ARGV[2])
    for _, entry in ipairs(held) do
        redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, entry[1], 'IDLE', 86400000, 'JUSTID')
    end
    if #held == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], ARGV[2]) end
end
"""
