"""What the servers of a Redis-protocol store do in one step each: functions in Lua, which one process loads for all.

Keys of one call are in one hash slot. Each function may be called again with the same arguments, as after a lost
connection: it then changes nothing more and answers as before.

What a commit reads and checks, it reads before it writes anything.

| function | keys | arguments | answer |
|---|---|---|---|
| commit | user, chunks, sequences, request ids, shown | see `redis_users.Change` | 1: stored, 0: conflict, -1: too \
many producers, -2: too many request ids |
| delete | user, chunks, shown | version or empty | the head, or nothing |
| chunks | user, chunks | epoch, chunk numbers | nothing if the epoch is another one, else the chunks |
| touch | user | | writes what is there again, so that a wait for replicas covers it |
| items | numbers, ids | ids | their numbers |
| generation | list | bundle id | its number |
| rollout | meta | revision, text | 1, or 0: it is not the next one |
| switch | off, revision | 1: off, 0: on; numbers | how many were not so |
| additions | added, revision | slots before, entries | 1, or 0: there are other slots |
"""

from __future__ import annotations

import hashlib
from typing import Any

_CODE = """
local function reader(args)
  local at = 0
  return function() at = at + 1; return args[at] end
end

local function has_another_version(head, expected)
  if not head then return expected ~= '' end
  return string.sub(head, 1, 8) ~= expected
end

local function put_all(key, next, count)
  for _ = 1, count do redis.call('HSET', key, next(), next()) end
end

local function commit(keys, args)
  local user, chunks, sequences, requests, shown = keys[1], keys[2], keys[3], keys[4], keys[5]
  local next = reader(args)
  local expected, version = next(), next()
  local head = redis.call('HGET', user, 'h')
  if head and string.sub(head, 1, 8) == version then
    redis.call('HSET', user, 'h', head)
    return 1
  end
  if has_another_version(head, expected) then return 0 end

  local steps, max_producers, new = {}, tonumber(next()), 0
  for _ = 1, tonumber(next()) do
    local producer, before, last = next(), next(), next()
    local found = redis.call('HGET', sequences, producer)
    if (found or '') ~= before then return 0 end
    if not found then new = new + 1 end
    steps[#steps + 1] = {producer, last}
  end
  if new > 0 and redis.call('HLEN', sequences) + new > max_producers then return -1 end

  local shown_before, shown_value, shown_seconds = next(), next(), next()
  if shown_value ~= '' then
    local found = redis.call('GET', shown) or ''
    if found ~= shown_before and found ~= shown_value then return 0 end
  end

  local now, oldest, period, max_ids, seconds = next(), next(), next(), tonumber(next()), next()
  local ids = {}
  for _ = 1, tonumber(next()) do ids[#ids + 1] = next() end
  if #ids > 0 then
    if not head then
      for _, id in ipairs(ids) do
        if redis.call('ZSCORE', requests, id) then return 0 end
      end
    end
    if redis.call('ZCOUNT', requests, '(' .. period, '+inf') + #ids > max_ids then return -2 end
  end

  for _, step in ipairs(steps) do redis.call('HSET', sequences, step[1], step[2]) end
  if #ids > 0 then
    redis.call('ZREMRANGEBYSCORE', requests, '-inf', '(' .. oldest)
    for _, id in ipairs(ids) do redis.call('ZADD', requests, now, id) end
    redis.call('EXPIRE', requests, seconds)
  end
  if shown_value ~= '' then redis.call('SET', shown, shown_value, 'EX', shown_seconds) end
  if next() == '1' then
    for _, field in ipairs(redis.call('HKEYS', user)) do
      local kind = string.sub(field, 1, 1)
      if kind == 'f' or kind == 'b' then redis.call('HDEL', user, field) end
    end
  end
  put_all(user, next, tonumber(next()))
  put_all(chunks, next, tonumber(next()))
  return 1
end

local function delete(keys, args)
  local head = redis.call('HGET', keys[1], 'h')
  if args[1] ~= '' and has_another_version(head, args[1]) then return false end
  redis.call('DEL', keys[1], keys[2], keys[3])
  return head
end

local function chunks(keys, args)
  if redis.call('HGET', keys[1], 'e') ~= table.remove(args, 1) then return false end
  return redis.call('HMGET', keys[2], unpack(args))
end

local function touch(keys, args)
  local head = redis.call('HGET', keys[1], 'h')
  if head then redis.call('HSET', keys[1], 'h', head) end
  return 1
end

local function items(keys, args)
  local found = {}
  for index, id in ipairs(args) do
    local number = redis.call('HGET', keys[1], id)
    if not number then
      number = redis.call('HLEN', keys[2])
      redis.call('HSET', keys[1], id, number)
      redis.call('HSET', keys[2], number, id)
    end
    found[index] = tonumber(number)
  end
  return found
end

local function generation(keys, args)
  for number, bundle in ipairs(redis.call('LRANGE', keys[1], 0, -1)) do
    if bundle == args[1] then return number end
  end
  return redis.call('RPUSH', keys[1], args[1])
end

local function rollout(keys, args)
  local before = tonumber(redis.call('HGET', keys[1], 'rollout_revision') or '0')
  local revision = tonumber(args[1])
  if before == revision and redis.call('HGET', keys[1], 'rollout') == args[2] then
    redis.call('HSET', keys[1], 'rollout', args[2])
    return 1
  end
  if before + 1 ~= revision then return 0 end
  redis.call('HSET', keys[1], 'rollout', args[2], 'rollout_revision', args[1])
  return 1
end

local function switch(keys, args)
  local command, changed = args[1] == '1' and 'SADD' or 'SREM', 0
  for index = 2, #args do changed = changed + redis.call(command, keys[1], args[index]) end
  if changed > 0 then redis.call('INCR', keys[2]) end
  return changed
end

local function additions(keys, args)
  local before, count = tonumber(args[1]), #args - 1
  local slots = redis.call('LLEN', keys[1])
  if slots == before then
    for index = 2, #args do redis.call('RPUSH', keys[1], args[index]) end
    redis.call('INCR', keys[2])
    return 1
  end
  if slots ~= before + count then return 0 end
  local last = redis.call('LRANGE', keys[1], before, -1)
  for index = 1, count do
    if last[index] ~= args[index + 1] then return 0 end
  end
  redis.call('SET', keys[2], redis.call('GET', keys[2]))
  return 1
end

local function register(name, callback, ...)
  REGISTER
end

register('commit', commit)
register('delete', delete, 'allow-oom')
register('chunks', chunks, 'no-writes')
register('touch', touch)
register('items', items)
register('generation', generation)
register('rollout', rollout)
register('switch', switch)
register('additions', additions)
"""
# Other code has another name, so that servers of two releases can share a store.
LIBRARY = f"dman_{hashlib.sha256(_CODE.encode()).hexdigest()[:12]}"
_FLAGGED = "redis.register_function{function_name = 'LIBRARY_' .. name, callback = callback, flags = {...}}"
_PLAIN = "redis.register_function('LIBRARY_' .. name, callback)"


def _code(register: str) -> str:
    return f"#!lua name={LIBRARY}\n{_CODE.replace('REGISTER', register).replace('LIBRARY', LIBRARY)}"


CODE, PLAIN_CODE = _code(_FLAGGED), _code(_PLAIN)  # Kvrocks knows no flags: github.com/apache/kvrocks/issues/2133


def call(name: str, keys: list[bytes], *arguments: Any) -> tuple[Any, ...]:
    """A command that calls a function."""
    return ("FCALL", f"{LIBRARY}_{name}", len(keys), *keys, *arguments)
