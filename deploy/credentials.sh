#!/bin/sh
# Makes what is missing of a stack's credentials. Each folder here is a volume: of the service that it
# is called after, but for `authority`, which nobody else mounts, and `keys`, the gateway's API keys.
#
#   credentials            make what is missing
#   credentials api-key    show the API key of the first start
#   credentials renew      make new certificates of the same authority; services take them as they run
set -eu
umask 077
cd "${CREDENTIALS_DIR:-/var/lib/precast/credentials}"
roles='gateway decode-worker compile-worker admin'

# place FILE TARGET [MODE]: whole or not at all
place() {
  cmp -s "$1" "$2" 2>/dev/null && return
  cp "$1" "$2.new"
  chmod "${3:-600}" "$2.new"
  mv "$2.new" "$2"
}

make_certificates() { precast keys tls authority >/dev/null; }

missing_certificates() {
  for role in $roles; do [ -s "authority/$role/tls.key" ] || return 0; done
  return 1
}

make_password() {
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >authority/redis.password.new
  printf 'requirepass %s\n' "$(cat authority/redis.password.new)" >authority/redis.conf
  mv authority/redis.password.new authority/redis.password
}

# A key counts from the moment in which its folder has its name: then it can be shown, too.
make_api_key() {
  rm -rf keys/.api
  precast keys api create first --api-keys-dir "$PWD/keys/.api" >authority/api-key 2>/dev/null
  mv keys/.api keys/api
  echo 'made an API key, which is not in this log: docker compose run --rm credentials api-key'
}

share() {
  for role in $roles; do
    mkdir -p "$role/$role"
    for file in ca.crt tls.crt tls.key; do place "authority/$role/$file" "$role/$role/$file"; done
    place authority/redis.password "$role/redis.password"
  done
  # Redis has a user of its own, in this one's group
  place authority/redis.password redis/redis.password 640
  place authority/redis.conf redis/redis.conf 640
}

case "${1:-}" in
  '') ;;
  api-key) exec cat authority/api-key ;;
  renew) make_certificates ;;
  *) echo "credentials: $1: neither api-key nor renew" >&2; exit 2 ;;
esac
if missing_certificates; then make_certificates; fi
[ -s authority/redis.password ] || make_password
share
[ -d keys/api ] || make_api_key
