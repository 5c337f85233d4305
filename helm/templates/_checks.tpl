{{/* What the schema cannot see. Each sentence says what to change. */}}

{{/* Seconds that a server pod may take from the moment it has to go. */}}
{{- define "sd-service.server.leastGrace" -}}
{{- $least := add .Values.server.preStopSeconds .Values.server.drainSeconds 10 -}}
{{- if include "sd-service.triton.sidecar" . -}}
{{- $least = add $least 30 -}}
{{- end -}}
{{- $least -}}
{{- end -}}

{{/* Triton gives requests in flight 15 s, then unloads its models. */}}
{{- define "sd-service.triton.leastGrace" -}}
{{- add .Values.triton.preStopSeconds 30 -}}
{{- end -}}

{{- define "sd-service.check" -}}
{{- $problems := list -}}
{{- $server := .Values.server -}}
{{- $triton := .Values.triton -}}
{{- if lt ($server.drainSeconds | int) ($server.maxGenerationSeconds | int) -}}
{{- $problems = append $problems (printf "server.drainSeconds is %v: make it at least server.maxGenerationSeconds, %v, or stopping a pod cuts generations off" $server.drainSeconds $server.maxGenerationSeconds) -}}
{{- end -}}
{{- if and $server.maxConnectionAgeSeconds (lt ($server.maxConnectionAgeGraceSeconds | int) ($server.drainSeconds | int)) -}}
{{- $problems = append $problems (printf "server.maxConnectionAgeGraceSeconds is %v: make it at least server.drainSeconds, %v, or an aged connection takes its generations along" $server.maxConnectionAgeGraceSeconds $server.drainSeconds) -}}
{{- end -}}
{{- range $name := list "server" "triton" -}}
{{- $grace := (index $.Values $name).terminationGracePeriodSeconds -}}
{{- $least := include (printf "sd-service.%s.leastGrace" $name) $ | int -}}
{{- if and (not (kindIs "invalid" $grace)) (lt ($grace | int) $least) -}}
{{- $problems = append $problems (printf "%s.terminationGracePeriodSeconds is %v: make it at least %d, or null, or SIGKILL comes before the end of the drain" $name $grace $least) -}}
{{- end -}}
{{- $rollout := (index $.Values $name).rollout -}}
{{- if and (eq ($rollout.maxSurge | toString | trimSuffix "%") "0") (eq ($rollout.maxUnavailable | toString | trimSuffix "%") "0") -}}
{{- $problems = append $problems (printf "%s.rollout has 0 for maxSurge and maxUnavailable: an update could never begin" $name) -}}
{{- end -}}
{{- $scaling := (index $.Values $name).autoscaling -}}
{{- if gt ($scaling.minReplicas | int) ($scaling.maxReplicas | int) -}}
{{- $problems = append $problems (printf "%s.autoscaling.minReplicas is %v, more than maxReplicas, %v" $name $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- if and (ne $scaling.kind "none") (not $.Values.metrics.enabled) -}}
{{- $problems = append $problems (printf "%s.autoscaling goes by metrics: set metrics.enabled" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (not $triton.enabled) (not $triton.url) -}}
{{- $problems = append $problems "triton.enabled is false: name another Triton with triton.url, as host:port" -}}
{{- end -}}
{{- if and $triton.enabled $triton.url -}}
{{- $problems = append $problems "triton.url is for another Triton: set triton.enabled to false, or leave it empty" -}}
{{- end -}}
{{- if and (not (include "sd-service.triton.separate" .)) (ne $triton.autoscaling.kind "none") -}}
{{- $problems = append $problems "triton.autoscaling is for a Triton with pods of its own: in sidecars, server.autoscaling scales both" -}}
{{- end -}}
{{- if and .Values.engines.add (ne .Values.engines.source "claim") -}}
{{- $problems = append $problems "engines.add writes to a claim: set engines.source to claim" -}}
{{- end -}}
{{- if and (eq .Values.engines.source "volume") (not .Values.engines.volume.reference) -}}
{{- $problems = append $problems "engines.source is volume: name an image with engines.volume.reference" -}}
{{- end -}}
{{- if and (eq .Values.engines.source "claim") (not .Values.engines.claim.existingClaim) (not .Values.engines.add) -}}
{{- $problems = append $problems "engines.source is claim: name one with engines.claim.existingClaim, or what to put on a new one with engines.add" -}}
{{- end -}}
{{- if and .Values.tls.enabled (not .Values.tls.existingSecret) (not .Values.tls.certificate.issuer.name) -}}
{{- $problems = append $problems "tls.enabled needs tls.existingSecret, or tls.certificate.issuer.name for cert-manager" -}}
{{- end -}}
{{- if and .Values.safety.mode (ne .Values.safety.mode "off") (not .Values.safety.model) -}}
{{- $problems = append $problems (printf "safety.mode is %s: name a model with safety.model" .Values.safety.mode) -}}
{{- end -}}
{{- if and .Values.ingress.enabled (or (not .Values.ingress.host) (not .Values.ingress.tlsSecret)) -}}
{{- $problems = append $problems "ingress.enabled needs ingress.host and ingress.tlsSecret: gRPC is HTTP/2, which ingresses speak with TLS" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- $problems = append $problems "grpcRoute.enabled needs grpcRoute.parentRefs, the gateways that it belongs to" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled .Values.tls.enabled -}}
{{- $problems = append $problems "grpcRoute speaks h2c to the server: end TLS at the gateway, and set tls.enabled to false" -}}
{{- end -}}
{{- if and .Values.ingress.enabled .Values.tls.enabled .Values.tls.clientCaSecret -}}
{{- $problems = append $problems "ingress has no certificate for tls.clientCaSecret: use one of both" -}}
{{- end -}}
{{- if and .Values.helmTest.enabled .Values.apiKeys.existingSecret (not .Values.helmTest.apiKeySecretKey) -}}
{{- $problems = append $problems "helmTest needs an API key: put a bare one into apiKeys.existingSecret and name its key with helmTest.apiKeySecretKey, or set helmTest.enabled to false" -}}
{{- end -}}
{{- if and .Values.helmTest.enabled .Values.tls.enabled .Values.tls.clientCaSecret -}}
{{- $problems = append $problems "helmTest has no certificate for tls.clientCaSecret: set helmTest.enabled to false" -}}
{{- end -}}
{{- if $problems -}}
{{- fail (printf "\n  sd-service: %s" (join "\n  sd-service: " $problems)) -}}
{{- end -}}
{{- end -}}
