#!/bin/sh
# Makes the Secret oserve-hosts from the nodes that run: hosts.yaml, and a token file for each.
# Run it once the pods of nodes.yaml are ready, and again when nodes were added; then restart the server.
set -eu
umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
echo "hosts:" > "$folder/hosts.yaml"
for pod in $(kubectl get pods -l app=oserve-node -o 'jsonpath={.items[*].metadata.name}'); do
  state=/var/lib/oserve/nodes/$pod
  kubectl exec "$pod" -c node -- cat "$state/token" > "$folder/$pod"
  # Of the identity only the certificate is read; the key stays where it is.
  sum=$(kubectl exec "$pod" -c node -- python -c '
import hashlib, json, ssl, sys
pem = json.load(open(sys.argv[1]))["certificate"]
print(hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest())' "$state/hatch-identity.json")
  cat >> "$folder/hosts.yaml" <<HOST
  - name: $pod
    address: $pod.oserve-node
    port: 7443
    token_file: /run/oserve/$pod
    certificate_sha256: '$sum'
HOST
done
kubectl create secret generic oserve-hosts --from-file="$folder" --dry-run=client -o yaml | kubectl apply -f -
